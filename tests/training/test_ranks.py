"""An error on one rank is raised on all: other settings, other data, an embedding with NaN or Inf."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import finish, start_ranks

from l2v.training import checkpoint

ALONE = {"stages.simcse.from": "base", "stages.supervised.from": "base"}


def sentence(outputs: list[str]) -> str:
    """The one sentence of rank 0; the others say nothing of it."""
    lines = [line for output in outputs for line in output.splitlines() if line.startswith("l2v: ")]
    assert len(lines) == 1 and lines[0] in outputs[0] and not any("Traceback" in output for output in outputs), outputs
    return lines[0]


@pytest.mark.parametrize(
    ("own", "key", "values"),
    [
        (["simcse.lr=1"], "stages.simcse.lr", "0.003 on rank 0; 1.0 on rank 1"),
        pytest.param(["--fresh"], "--fresh", "false on rank 0; true on rank 1", marks=pytest.mark.slow),
    ],
    ids=["rate", "flag"],
)
def test_ranks_with_other_settings(tiny_recipe, tmp_path, own, key, values):
    path = tiny_recipe(tmp_path, **ALONE)
    common = [path, "--stage", "simcse"]
    said = sentence(finish(start_ranks([common, [*common, *own]]), expect=1))
    assert (
        f"l2v: the ranks do not agree on {key}: {values}; all ranks need the same recipe, command line, data and"
        in said
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_recipe_that_one_rank_cannot_read(tiny_recipe, tmp_path):
    path = tiny_recipe(tmp_path, **ALONE)
    said = sentence(finish(start_ranks([[path], [tmp_path / "gone.yaml"]]), expect=2))
    assert "there is no recipe" in said and "gone.yaml" in said


@pytest.mark.parametrize("change", [pytest.param("one row fewer", marks=pytest.mark.slow), "another length"])
def test_nodes_with_other_data(tiny_recipe, tmp_path, sentences, write_jsonl, change):
    """A relative path, on each node a file of its own."""
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    texts = [sentences[:12], sentences[:11] if change == "one row fewer" else [*sentences[:11], "Fisk."]]
    for node, lines in zip(nodes, texts, strict=True):
        node.mkdir()
        write_jsonl(node / "rows.jsonl", [{"text": text} for text in lines])
    path = tiny_recipe(tmp_path, **ALONE, **{"stages.simcse.data": "rows.jsonl"})
    said = sentence(finish(start_ranks([[path, "--stage", "simcse"]] * 2, folders=nodes), expect=1))
    assert "do not agree on the examples of stage 'simcse': \"12 examples, " in said
    assert f'on rank 0; "{11 if change == "one row fewer" else 12} examples, ' in said
    assert not list((tmp_path / "run").rglob("step-*"))


def broken_base(folder: Path, config: dict, tokenizer: str, text: str) -> str:
    """A base whose weights hold an infinity for the one token of `text`."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    (token,) = words(text, add_special_tokens=False)["input_ids"]
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**config))
    with torch.no_grad():
        model.model.embed_tokens.weight[token, 3] = torch.inf
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_an_embedding_that_is_not_finite_stops_every_rank(
    tiny_recipe, tmp_path, tiny_config, bos_tokenizer_folder, write_jsonl, sentences, world
):
    base = broken_base(tmp_path / "base", tiny_config, bos_tokenizer_folder, "%")
    pairs = [{"query": f"{i}: hvem?", "positive": text, "negatives": [sentences[50 + i]]} for i, text in
             enumerate(sentences[:24])]  # fmt: skip
    pairs[19]["negatives"] = ["100 %"]
    changes = {"base.model": base, "base.init": "pretrained", "base.config": None, "base.tokenizer": None}
    changes |= {"stages.supervised.data": write_jsonl(tmp_path / "rows.jsonl", pairs)}
    changes |= {
        f"stages.supervised.{k}": v
        for k, v in {"micro_tokens": 104, "save_every": 1, "steps": 6, "skip_limit": 1}.items()
    }
    path = tiny_recipe(tmp_path, **ALONE, **changes)
    said = sentence(finish(start_ranks([[path, "--stage", "supervised"]] * world), expect=1, timeout=300))
    step = int(said.split("step ")[1].split(":")[0])
    assert f"step {step}: the embedding of the negative 1 of example 19 is NaN or Inf (1 of " in said, said
    assert "so it was not applied; remove or fix the text" in said
    run = tmp_path / "run" / "supervised"
    rows = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, step + 1)) and not (run / "adapter").exists()
    before = checkpoint.newest(run / "checkpoints")
    assert before.step == step and before.facts["skipped"] == 1
    weights = load_file(run / "checkpoints" / f"step-{step:06d}" / checkpoint.TENSORS)
    if step > 1:
        assert all(value.isfinite().all() for value in weights.values())
