"""Bidirectional means behaviour, for every family, backend and export; segments do not see each other by one bit."""

import numpy as np
import pytest
import torch
from transformers import AutoModel

from l2v.batch import Segment, pack
from l2v.model.load import inner_model, load_model, output_head
from l2v.model.lora import add_lora
from l2v.model.packed import PackedDecoder
from l2v.recipe import Base, Lora

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma"]
BACKENDS = ["l2v", "sdpa"]
LENGTHS = [7, 1, 12, 5]


def build(family: str, *, backend: str = "l2v", attention: str = "bidirectional", dropout: float = 0.0, **kwargs):
    base = Base(
        model=family, init="random", config=SHAPE | {"model_type": family}, backend=backend, attention=attention
    )
    model = load_model(base, head=True, dtype=torch.float32, seed=3)
    decoder = inner_model(model)
    if dropout:
        decoder = add_lora(decoder, Lora(r=4, alpha=8, dropout=dropout), base_name=family, seed=1)
        for name, parameter in decoder.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    causal = attention == "causal"
    return PackedDecoder(decoder, head=output_head(model), causal=causal, backend=backend, **kwargs)


def segments(seed: int = 0) -> list[Segment]:
    generator = np.random.default_rng(seed)
    return [Segment(generator.integers(3, 96, n), 0, example=i, column=0) for i, n in enumerate(LENGTHS)]


def changed(parts: list[Segment], which: int, position: int) -> list[Segment]:
    out = [Segment(s.ids.copy(), s.pool_start, s.example, s.column) for s in parts]
    out[which].ids[position] = (out[which].ids[position] + 17) % 90 + 3
    return out


def split(hidden_TE: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return hidden_TE.split(LENGTHS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_token_reaches_the_first_state(family, backend):
    parts = segments()
    for attention, moves in (("bidirectional", True), ("causal", False)):
        model = build(family, backend=backend, attention=attention).eval()
        before = split(model(pack(parts), "hidden"))[2]
        after = split(model(pack(changed(parts, 2, -1)), "hidden"))[2]
        assert (not torch.equal(before[0], after[0])) == moves, attention
        assert not torch.equal(before[-1], after[-1])


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("family", FAMILIES)
def test_segments_are_isolated_bitwise(family, mode):
    """Outputs of the other segments do not move by one bit, in inference and in training with dropout."""
    parts = segments()
    model = build(family, dropout=0.1, attention_dropout=0.3)
    model.train(mode == "training")
    before, after = (split(model(pack(p), "hidden")) for p in (parts, changed(parts, 2, 3)))
    for i in (0, 1, 3):
        assert torch.equal(before[i], after[i]), f"segment {i} saw segment 2"
    assert not torch.equal(before[2], after[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone_with_and_without_noise(family):
    parts = segments()
    model = build(family, dropout=0.1, attention_dropout=0.3)
    for training in (False, True):
        model.train(training)
        together = split(model(pack(parts, seed=5, step=2), "hidden"))
        order = [2, 0, 3, 1]
        shuffled = model(pack([parts[i] for i in order], seed=5, step=2), "hidden").split([LENGTHS[i] for i in order])
        for i, part in enumerate(parts):
            alone = model(pack([part], seed=5, step=2), "hidden")
            torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=0)
            torch.testing.assert_close(shuffled[order.index(i)], alone, atol=1e-5, rtol=0)


def test_noise_follows_seed_step_example_and_column():
    model = build("llama", dropout=0.1, attention_dropout=0.3).train()
    ids = segments()[2].ids
    reference = model(pack([Segment(ids, 0, 4, 1)], seed=5, step=2), "vectors")
    again = model(pack([Segment(ids, 0, 4, 1)], seed=5, step=2), "vectors")
    assert torch.equal(reference, again)
    for example, column, seed, step in ((5, 1, 5, 2), (4, 0, 5, 2), (4, 1, 6, 2), (4, 1, 5, 3)):
        other = model(pack([Segment(ids, 0, example, column)], seed=seed, step=step), "vectors")
        assert not torch.allclose(reference, other, atol=1e-3)


def test_recompute_sees_the_same_noise():
    plain, recomputed = (build("llama", dropout=0.1, attention_dropout=0.3).train() for _ in range(2))
    recomputed.decoder.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    gradients = []
    for model in (plain, recomputed):
        model(pack(segments()), "vectors").square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, value in gradients[0].items():
        assert torch.equal(value, gradients[1][name]), name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_export_is_bidirectional_in_plain_transformers(family, implementation, tmp_path):
    model = build(family).eval()
    decoder = model.decoder
    decoder.config._attn_implementation = "sdpa"
    decoder.save_pretrained(tmp_path)
    decoder.config._attn_implementation = "l2v"
    plain = AutoModel.from_pretrained(tmp_path, attn_implementation=implementation).eval()
    assert plain.config.is_causal is False
    parts = segments()
    expected = split(model(pack(parts), "hidden"))
    with torch.no_grad():
        for part, states in zip(parts, expected, strict=True):
            got = plain(input_ids=torch.from_numpy(part.ids)[None])[0][0]
            torch.testing.assert_close(got, states, atol=1e-5, rtol=0)
        longest = max(LENGTHS)  # padded on the right, as sentence-transformers does it
        ids = torch.zeros(len(parts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, part in enumerate(parts):
            ids[row, : len(part)] = torch.from_numpy(part.ids)
            mask[row, : len(part)] = 1
        padded = plain(input_ids=ids, attention_mask=mask)[0]
    for row, states in enumerate(expected):
        torch.testing.assert_close(padded[row, : len(states)], states, atol=1e-5, rtol=0)


def test_logits_touch_only_labelled_positions():
    model = build("llama").eval()
    batch = pack(segments(), label_index=[2, 9], labels=[5, 6])
    hidden_TE = model(batch, "hidden")
    torch.testing.assert_close(model(batch, "logits"), model.head(hidden_TE[[2, 9]]))
