"""Peers of the train-step benchmark: plain transformers + PEFT, the same with Liger-Kernel, sentence-transformers' trainer.

python -m benchmarks.train_step.peers SPEC.json     (`record.Spec`)

None is slowed down: the first two have their batches ready before the clock runs, and adapters in the base's dtype; all pad
to the longest text of a column, and a batch without pads goes in without a mask, which SDPA is fastest with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import Unavailable, need_package
from benchmarks.train_step.record import Recorder, Setting, Spec, clock, run

Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def padded(rows: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
    """int64 [rows, longest], filled to the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows])


def columns(batch: dict[str, list]) -> list[Part]:
    """ids, pooling mask and attention mask of every column of a contrastive batch."""
    out = []
    for ids, starts in zip(zip(*batch["ids"], strict=True), zip(*batch["starts"], strict=True), strict=True):
        pool = [[0] * start + [1] * (len(text) - start) for text, start in zip(ids, starts, strict=True)]
        out.append((padded(ids, 0), padded(pool, 0), _mask(ids)))
    return out


def blocks(batch: dict[str, list], rows: int | None) -> list[Part]:
    """ids, labels and attention mask of every micro-batch of an MNTP batch. rows: blocks in a micro-batch, None is all."""
    size = rows or len(batch["masked"])
    out = []
    for at in range(0, len(batch["masked"]), size):
        ids, labels = (batch[key][at : at + size] for key in ("masked", "labels"))
        out.append((padded(ids, 0), padded(labels, -100), _mask(ids)))
    return out


def _mask(ids) -> torch.Tensor | None:
    mask = padded([[1] * len(row) for row in ids], 0)
    return None if mask.all() else mask


def transformers_peft(spec: Spec, recorder: Recorder) -> None:
    """Plain transformers + PEFT: SDPA, torch's AdamW, a loop as short as it can be."""
    from l2v.model.load import inner_model, load_model
    from l2v.model.lora import add_lora
    from l2v.recipe import Base, Lora

    device, mntp = torch.device(spec.device), spec.stage == "mntp"
    base = Base(model=spec.base, backend="sdpa")
    model = load_model(base, head=mntp, dtype=getattr(torch, spec.dtype))
    add_lora(inner_model(model), Lora(**spec.lora), base_name=spec.base, seed=0)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = spec.attention_dropout
    model.to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    fresh = [p.detach().clone() for p in parameters]
    batches = json.loads(Path(spec.batches).read_text(encoding="utf-8"))
    for setting in recorder.settings():
        for parameter, value in zip(parameters, fresh, strict=True):
            parameter.data.copy_(value)
            parameter.grad = None
        optimizer = torch.optim.AdamW(parameters, lr=spec.lr, betas=tuple(spec.betas), weight_decay=spec.weight_decay)
        model.gradient_checkpointing_disable()
        if setting.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ready = [blocks(batch, setting.rows) if mntp else columns(batch) for batch in batches]
        torch.manual_seed(0)
        recorder.start()
        with recorder.attempt():
            for parts in ready:
                loss = _mntp(model, parts, device) if mntp else _contrastive(model, parts, device, spec.scale)
                torch.nn.utils.clip_grad_norm_(parameters, spec.clip)
                optimizer.step()
                optimizer.zero_grad()
                tokens = sum(int(ids.numel() if mask is None else mask.sum()) for ids, _, mask in parts)
                if not recorder.step(tokens, sum(ids.numel() for ids, *_ in parts), float(loss)):
                    break


def _mntp(model, parts: list[Part], device: torch.device) -> torch.Tensor:
    """Backward of the mean over the labels of all micro-batches; returns it."""
    total, count = torch.zeros((), device=device), sum(int((labels != -100).sum()) for _, labels, _ in parts)
    for part in parts:
        ids, labels, mask = _moved(part, device)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=count, use_cache=False).loss
        loss.backward()
        total += loss.detach()
    return total


def _contrastive(model, parts: list[Part], device: torch.device, scale: float) -> torch.Tensor:
    """Backward of the InfoNCE of the first column against all others; returns it."""
    unit = []
    for part in parts:
        ids, pool, mask = _moved(part, device)
        hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state.float()
        pooled = (hidden * pool.unsqueeze(-1)).sum(1) / pool.sum(1, keepdim=True)
        unit.append(torch.nn.functional.normalize(pooled, dim=-1))
    scores = scale * unit[0] @ torch.cat(unit[1:]).T
    loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(scores), device=device))
    loss.backward()
    return loss.detach()


def _moved(part: Part, device: torch.device) -> Part:
    return tuple(None if x is None else x.to(device, non_blocking=True) for x in part)


def liger(spec: Spec, recorder: Recorder) -> None:
    """The same with Liger-Kernel's RoPE, RMSNorm, SwiGLU and fused linear cross-entropy."""
    need_package("liger_kernel", "liger-kernel")
    if spec.device == "cpu":
        raise Unavailable("Liger-Kernel's kernels need a GPU")
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    transformers_peft(spec, recorder)


def sentence_transformers(spec: Spec, recorder: Recorder) -> None:
    """sentence-transformers' own trainer and MultipleNegativesRankingLoss, on the same texts in the same steps."""
    if spec.stage == "mntp":
        raise Unavailable("sentence-transformers has no masked next-token prediction")
    need_package("sentence_transformers", "sentence-transformers")
    batches = json.loads(Path(spec.batches).read_text(encoding="utf-8"))
    rows = [row for batch in batches for row in batch["texts"]]
    for setting in recorder.settings():
        with recorder.attempt():
            _train(spec, recorder, setting, rows)


def _train(spec: Spec, recorder: Recorder, setting: Setting, rows: list[list[str]]) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from sentence_transformers.models import Pooling
    from sentence_transformers.sampler import DefaultBatchSampler
    from torch.utils.data import SequentialSampler

    loaded = SentenceTransformer(
        spec.base, device=spec.device, config_kwargs={"attention_dropout": spec.attention_dropout},
        model_kwargs={"dtype": getattr(torch, spec.dtype), "attn_implementation": "sdpa"},
    )  # fmt: skip
    body = loaded[0]
    body.max_seq_length = spec.length
    model = SentenceTransformer(modules=[body, Pooling(body.auto_model.config.hidden_size, "mean")], device=spec.device)
    lora = spec.lora
    model.add_adapter(
        LoraConfig(r=lora["r"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"], target_modules=lora["targets"])
    )
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(Path(spec.out).with_suffix(".trainer")), max_steps=spec.warmup + spec.steps,
        per_device_train_batch_size=spec.batch, learning_rate=spec.lr, weight_decay=spec.weight_decay,
        max_grad_norm=spec.clip, optim="adamw_torch", save_strategy="no", logging_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=spec.device == "cpu", gradient_checkpointing=setting.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if setting.checkpointing else None,
        batch_sampler=lambda data, batch_size, drop_last, **_: DefaultBatchSampler(
            SequentialSampler(data), batch_size=batch_size, drop_last=drop_last
        ),
    )  # fmt: skip
    loss = _Watched(MultipleNegativesRankingLoss(model, scale=spec.scale))
    names = ("anchor", "positive", "negative")
    trainer = SentenceTransformerTrainer(
        model=model, args=arguments, loss=loss, callbacks=[clock(recorder, loss.read)],
        train_dataset=Dataset.from_list([dict(zip(names, row, strict=False)) for row in rows]),
    )  # fmt: skip
    trainer.train()


class _Watched(torch.nn.Module):
    """A loss that remembers what it gave, and the masks that it was given."""

    def __init__(self, loss: torch.nn.Module) -> None:
        super().__init__()
        self.loss, self.masks, self.value = loss, [], None

    def forward(self, features, labels=None):
        self.masks += [x["attention_mask"] for x in features]
        value = self.loss(features, labels)
        self.value = value.detach()
        return value

    def read(self) -> tuple[int, int, float]:
        """tokens, places and loss since the last call."""
        masks, self.masks = self.masks, []
        return sum(int(x.sum()) for x in masks), sum(x.numel() for x in masks), float(self.value)


PROVIDERS = {
    "transformers_peft": transformers_peft,
    "liger": liger,
    "sentence_transformers": sentence_transformers,
}

if __name__ == "__main__":
    run(sys.argv[1:], PROVIDERS)
