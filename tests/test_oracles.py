"""Golden values of the public reference implementation, reached through the packed path.

The full set is read from the folder that L2V_ORACLES names; a smaller set of our own making travels in tests/golden.
"""

import functools
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from l2v.batch import Segment, pack
from l2v.model.load import inner_model, load_model, output_head
from l2v.model.lora import merge_adapters
from l2v.model.packed import PackedDecoder
from l2v.model.pooling import pool
from l2v.objectives.contrastive import Groups, contrastive_loss
from l2v.objectives.mntp import mntp_loss, mntp_loss_of_hidden
from l2v.recipe import Base

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = [pytest.param(GOLDEN, id="shipped")]
if os.environ.get("L2V_ORACLES"):
    FOLDERS.append(pytest.param(Path(os.environ["L2V_ORACLES"]) / "llm2vec" / "llama", id="reference"))
GEMMA3 = pytest.param(GOLDEN / "gemma3", id="gemma3")
CONTRASTIVE = [
    pytest.param(*folder.values, name, id=f"{folder.id}-{name}")
    for folder in [*FOLDERS, GEMMA3]
    for name in (["triplets"] if folder is GEMMA3 else ["pairs", "triplets"])
]

TOLERANCE = 1e-5
BACKENDS = ["l2v", "sdpa"]


def load(folder: Path):
    scalars = json.loads((folder / "cases.json").read_text())
    return load_file(folder / "cases.safetensors") | {k: torch.tensor(v) for k, v in scalars.items()}


def segments(cases, name: str, embed: str | None = None, column: int = 0) -> list[Segment]:
    """Rows of a left-padded batch without their padding."""
    ids, mask = cases[f"{name}.input_ids"], cases[f"{name}.attention_mask"].bool()
    out = []
    for row, keep in enumerate(mask):
        start = 0
        if embed:
            start = int((cases[f"{name}.{embed}"][row][keep] == 0).sum())
        out.append(Segment(ids[row][keep].numpy(), start, example=row, column=column))
    return out


def decoder(folder: Path, backend: str, *, merged=(), adapter=None, head=False) -> PackedDecoder:
    from peft import PeftModel

    base = Base(model=str(folder / "base"), backend=backend)
    model = load_model(base, head=head, dtype=torch.float32)
    inner = merge_adapters(inner_model(model), [str(folder / name) for name in merged])
    if adapter:
        inner = PeftModel.from_pretrained(inner, folder / adapter, is_trainable=True)
    return PackedDecoder(inner, head=output_head(model) if head else None, backend=backend).eval()


def assert_gradients(model: PackedDecoder, cases, name: str) -> None:
    prefix = f"{name}.grad."
    expected = {k.removeprefix(prefix): v for k, v in cases.items() if k.startswith(prefix)}
    got = {
        k.removeprefix("decoder.").replace(".default.", "."): p.grad
        for k, p in model.named_parameters()
        if p.requires_grad
    }
    assert got.keys() == expected.keys() and len(got) == 28
    for key, value in expected.items():
        # Gradients reach 16 at scale 50; the golden ones, float32 as well, lie 1.2e-5 from float64.
        message = functools.partial("{}: {}".format, key)
        torch.testing.assert_close(got[key], value, atol=TOLERANCE, rtol=TOLERANCE, msg=message)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("folder", [*FOLDERS, GEMMA3])
def test_hidden_states(folder, backend):
    cases = load(folder)
    hidden_TE = decoder(folder, backend)(pack(segments(cases, "hidden")), "hidden")
    expected_TE = cases["hidden.last_hidden_state"][cases["hidden.attention_mask"].bool()]
    torch.testing.assert_close(hidden_TE, expected_TE, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("want", ["logits", "loss"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("folder", [*FOLDERS, GEMMA3])
def test_mntp_loss_and_gradients(folder, backend, want):
    cases = load(folder)
    ids, labels = cases["mntp.input_ids"], cases["mntp.labels"]
    rows = [Segment(row.numpy(), example=i) for i, row in enumerate(ids)]
    flat = labels.flatten()
    index = [i for i in range(len(flat)) if flat[i] != -100 and i % labels.shape[1] > 0]
    batch = pack(rows, label_index=[i - 1 for i in index], labels=flat[index])
    model = decoder(folder, backend, adapter="mntp_adapter", head=True)
    if want == "logits":
        loss = mntp_loss(model(batch, "logits"), batch.labels_L, len(index))
    else:
        loss, _ = model(batch, "loss", functools.partial(mntp_loss_of_hidden, count=len(index)))
    torch.testing.assert_close(loss, cases["mntp.loss"].float(), atol=TOLERANCE, rtol=0)
    loss.backward()
    assert_gradients(model, cases, "mntp")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("how", "key"), [("mean", "mean"), ("weighted_mean", "weighted_mean"), ("last", "eos_token")])
@pytest.mark.parametrize("folder", FOLDERS)
def test_pooling(folder, backend, how, key):
    cases = load(folder)
    model = decoder(folder, backend, merged=["mntp_adapter"], adapter="contrastive_adapter")
    batch = pack(segments(cases, "pool", "embed_mask"))
    vectors_SE = pool(model(batch, "hidden"), batch, how)
    torch.testing.assert_close(vectors_SE, cases[f"pool.{key}"], atol=TOLERANCE, rtol=0)


def test_merging_both_adapters_gives_the_same_vectors():
    cases = load(GOLDEN)
    model = decoder(GOLDEN, "l2v", merged=["mntp_adapter", "contrastive_adapter"])
    vectors_SE = model(pack(segments(cases, "pool", "embed_mask")))
    torch.testing.assert_close(vectors_SE, cases["pool.mean"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("folder", "name"), CONTRASTIVE)
def test_contrastive_loss_and_gradients(folder, backend, name):
    cases = load(folder)
    columns = ["q", "d"] + (["n"] if name == "triplets" else [])
    parts = [segments(cases, f"{name}.{c}", "embed_mask", column=i) for i, c in enumerate(columns)]
    batch = pack([segment for example in zip(*parts, strict=True) for segment in example])
    model = decoder(folder, backend, merged=["mntp_adapter"], adapter="contrastive_adapter")
    groups = Groups.from_columns(batch.columns_S, batch.text_keys_S)
    loss = contrastive_loss(model(batch), groups, scale=float(cases[f"{name}.scale"]), mask_duplicates=False)
    torch.testing.assert_close(loss, cases[f"{name}.loss"].float(), atol=TOLERANCE, rtol=0)
    loss.backward()
    assert_gradients(model, cases, name)
