"""McGill's package llm2vec as a peer of the train-step benchmark, in its own environment.

python -m benchmarks.train_step.peer_llm2vec SPEC.json     (`record.Spec`)

The package (0.2.x, transformers 4.44.2) has models, pooling and loss; the step around them is that of its published training
programs: transformers' Trainer; for MNTP its language-modelling collator with `_` as the mask, the head trained along; for the
contrastive stages one forward a column, padded to the left; layers computed twice, adapters in float32 on the base's dtype.
Attention is flash-attn where that is installed, else SDPA.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch

from benchmarks.harness import Unavailable
from benchmarks.train_step.record import Recorder, Spec, clock, run

SEPARATOR = "!@#$%^&*()"
"""Separates an instruction from the text that is embedded, as the package expects it."""


def llm2vec(spec: Spec, recorder: Recorder) -> None:
    """The package's step."""
    if importlib.util.find_spec("llm2vec") is None:
        raise Unavailable("llm2vec is not installed: name an environment that has it with --llm2vec")
    # Its Trainer is called with lists; an installed `datasets` of another age would only be imported.
    import transformers.utils.import_utils as transformers_imports

    transformers_imports._datasets_available = False
    batches = json.loads(Path(spec.batches).read_text(encoding="utf-8"))
    for _ in recorder.settings():
        with recorder.attempt():
            (_mntp if spec.stage == "mntp" else _contrastive)(spec, recorder, batches)


def _options(spec: Spec) -> dict:
    flash = spec.device != "cpu" and importlib.util.find_spec("flash_attn") is not None
    return {
        "torch_dtype": getattr(torch, spec.dtype),
        "attn_implementation": "flash_attention_2" if flash else "sdpa",
    }


def _adapted(inner, spec: Spec):
    from peft import LoraConfig, get_peft_model

    lora = spec.lora
    return get_peft_model(
        inner,
        LoraConfig(
            r=lora["r"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], target_modules=lora["targets"],
            bias="none", task_type=None,
        ),
    )  # fmt: skip


def _mntp(spec: Spec, recorder: Recorder, batches: list) -> None:
    from llm2vec.models import LlamaBiForMNTP
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    tokenizer = AutoTokenizer.from_pretrained(spec.base)
    tokenizer.mask_token = "_"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = LlamaBiForMNTP.from_pretrained(spec.base, **_options(spec))
    model.set_model_for_peft(_adapted(model.get_model_for_peft(), spec))
    blocks = [ids for batch in batches for ids in batch["ids"]]
    special = [tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True) for ids in blocks]
    rows = [{"input_ids": x, "special_tokens_mask": y} for x, y in zip(blocks, special, strict=True)]
    collator = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm_probability=spec.mask_probability)
    _train(spec, recorder, model, rows, collator, None)


def _contrastive(spec: Spec, recorder: Recorder, batches: list) -> None:
    from llm2vec import LLM2Vec
    from llm2vec.loss.utils import load_loss

    model = LLM2Vec.from_pretrained(
        spec.base, enable_bidirectional=True, pooling_mode="mean", max_length=spec.length,
        attention_dropout=spec.attention_dropout, **_options(spec),
    )  # fmt: skip
    model.model = _adapted(model.model, spec)
    rows = [{"texts": texts} for batch in batches for texts in batch["texts"]]

    def collator(examples):
        columns = zip(*(x["texts"] for x in examples), strict=True)
        return {"columns": [model.tokenize([SEPARATOR + text for text in column]) for column in columns]}

    _train(spec, recorder, model, rows, collator, load_loss("HardNegativeNLLLoss", scale=spec.scale))


def _train(spec: Spec, recorder: Recorder, model, rows: list, collator, loss_function) -> None:
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    seen: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []

    class StepTrainer(Trainer):
        def _get_train_sampler(self):
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            if loss_function is None:
                seen.append(inputs["attention_mask"])
                loss = super().compute_loss(model, inputs)
            else:
                seen.extend(x["attention_mask"].clone() for x in inputs["columns"])
                loss = loss_function(*(model(column) for column in inputs["columns"]))
            losses.append(loss.detach())
            return loss

    def read() -> tuple[int, int, float]:
        masks = [seen.pop() for _ in range(len(seen))]
        return sum(int(x.sum()) for x in masks), sum(x.numel() for x in masks), float(losses[-1])

    arguments = TrainingArguments(
        output_dir=str(Path(spec.out).with_suffix(".trainer")), max_steps=spec.warmup + spec.steps,
        per_device_train_batch_size=spec.batch, learning_rate=spec.lr, weight_decay=spec.weight_decay,
        max_grad_norm=spec.clip, save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        remove_unused_columns=False, use_cpu=spec.device == "cpu",
        gradient_checkpointing=recorder.setting.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recorder.setting.checkpointing else None,
    )  # fmt: skip
    trainer = StepTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[clock(recorder, read)]
    )
    trainer.train()


if __name__ == "__main__":
    run(sys.argv[1:], {"llm2vec": llm2vec})
