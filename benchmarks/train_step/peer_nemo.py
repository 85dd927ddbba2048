"""NVIDIA's NeMo AutoModel as a peer of the train-step benchmark, in its own environment: its bi-encoder and its LoRA.

python -m benchmarks.train_step.peer_nemo SPEC.json     (`record.Spec`)

The package (nemo-automodel 0.7) pins a transformers of its own. Model, bidirectional attention, pooling, LoRA and its fused MLP
are the package's; the step around them is that of its recipe for bi-encoders: one forward for queries and one for all passages
of a batch, in-batch negatives, cosines over the temperature. On a GPU the model is made as the recipe makes it, with
Liger-Kernel; on a CPU, where that path does not exist, from the same class. Its mean over a text counts the BOS token too, so
its losses differ from ours in the third digit.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Unavailable
from benchmarks.train_step.record import Recorder, Spec, run


def nemo(spec: Spec, recorder: Recorder) -> None:
    """The package's step."""
    if importlib.util.find_spec("nemo_automodel") is None:
        raise Unavailable("nemo-automodel is not installed: name an environment that has it with --nemo")
    if spec.stage == "mntp":
        raise Unavailable("NeMo AutoModel has no masked next-token prediction")
    if spec.attention_dropout:
        raise Unavailable("NeMo AutoModel's recipe sets no attention dropout")
    device = torch.device(spec.device)
    batches = json.loads(Path(spec.batches).read_text(encoding="utf-8"))
    ready = [_moved(inputs(batch["ids"]), device) for batch in batches]
    for setting in recorder.settings():
        with recorder.attempt():
            model = _model(spec, device)
            if setting.checkpointing:
                model.model.gradient_checkpointing_enable({"use_reentrant": False})
            _train(spec, recorder, model.train(), ready)
        model = None


def inputs(ids: list[list[list[int]]]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Queries, and passages in the recipe's order: those of the first query, those of the second; padded to the right.

    ids: of every example, of every column; the first column is the query's.
    """
    return _padded([example[0] for example in ids]), _padded([text for example in ids for text in example[1:]])


def _padded(texts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, texts))
    ids = torch.tensor([[*text, *[0] * (longest - len(text))] for text in texts])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


def _moved(parts: tuple[dict[str, torch.Tensor], ...], device: torch.device) -> tuple[dict[str, torch.Tensor], ...]:
    return tuple({key: value.to(device) for key, value in part.items()} for part in parts)


def _model(spec: Spec, device: torch.device) -> Any:
    from nemo_automodel.components._peft.lora import PeftConfig, apply_lora_to_linear_modules

    lora = spec.lora
    adapters = PeftConfig(
        target_modules=[f"*.{name}" for name in lora["targets"]], dim=lora["r"], alpha=lora["alpha"], dropout=lora["dropout"],
        dropout_position="pre",
    )  # fmt: skip
    options = {"pooling": "avg", "l2_normalize": True, "is_causal": False, "do_distributed_inbatch_negative": True}
    torch.manual_seed(0)
    if device.type == "cuda":
        from nemo_automodel import NeMoAutoModelBiEncoder

        return NeMoAutoModelBiEncoder.from_pretrained(
            spec.base, torch_dtype=spec.dtype, attn_implementation="sdpa", peft_config=adapters, **options
        )
    from nemo_automodel._transformers.retrieval import BiEncoderModel

    model = BiEncoderModel.build(spec.base, dtype=getattr(torch, spec.dtype), attn_implementation="sdpa", **options)
    apply_lora_to_linear_modules(model, adapters)
    return model.to(device)


def _train(spec: Spec, recorder: Recorder, model: torch.nn.Module, ready: list) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=spec.lr, betas=tuple(spec.betas), weight_decay=spec.weight_decay)
    recorder.start()
    for queries, passages in ready:
        query_NE, passage_ME = model(queries), model(passages)
        scores_NM = query_NE @ passage_ME.T * spec.scale
        each = len(passage_ME) // len(query_NE)
        loss = torch.nn.functional.cross_entropy(scores_NM, torch.arange(len(query_NE), device=scores_NM.device) * each)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, spec.clip)
        optimizer.step()
        optimizer.zero_grad()
        masks = (queries["attention_mask"], passages["attention_mask"])
        if not recorder.step(sum(int(x.sum()) for x in masks), sum(x.numel() for x in masks), float(loss)):
            break


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run(sys.argv[1:], {"nemo": nemo})
