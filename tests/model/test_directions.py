"""Gemma 3's three windows: what a file states, what plain transformers sees by it, and what l2v sees in its place."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig

from l2v.batch import Segment, pack
from l2v.model.export_proof import keys_to_state, save_weights
from l2v.model.load import inner_model, load_config, load_model
from l2v.model.packed import PackedDecoder
from l2v.recipe import Base

W = 8
SHAPE = {
    "model_type": "gemma3_text",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "layer_types": ["sliding_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "sliding_window": W,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
IDS = np.arange(5, 5 + 3 * W)
FILES = {
    "by is_causal": ({"is_causal": False}, W),
    "by the flag": ({"use_bidirectional_attention": True}, W // 2),
    "by both": ({"is_causal": False, "use_bidirectional_attention": True}, W // 2 + 1),
}
"""Keys of a config.json, and the farthest token that transformers sees by it."""


def reach(states) -> tuple[int, int]:
    """How far back and ahead a token in the middle sees; states: [n, t, E] of n texts, from their ids [n, t]."""
    middle, ids = len(IDS) // 2, np.tile(IDS, (len(IDS) + 1, 1))
    ids[range(len(IDS)), range(len(IDS))] = 90  # text i differs at token i, the last one nowhere
    found = states(ids)[:, middle]
    moved = ((found[:-1] - found[-1]).abs().amax(-1) > 1e-6).tolist()
    return middle - moved.index(True), len(moved) - 1 - moved[::-1].index(True) - middle


@torch.no_grad()
def plain_reach(folder, attention="eager"):
    """Of plain transformers on a folder."""
    model = AutoModel.from_pretrained(folder, attn_implementation=attention).eval()
    return reach(lambda ids: model(input_ids=torch.from_numpy(ids))[0])


def packed_of(model, layers="auto", **base):
    base = Base(model=str(model), **base)
    return PackedDecoder(
        inner_model(load_model(base, head=False, dtype=torch.float32)), causal=base.attention == "causal",
        backend=base.backend, layers=layers,
    ).eval()  # fmt: skip


@torch.no_grad()
def packed_reach(packed):
    """Of l2v, all texts in one pack."""
    return reach(lambda ids: packed(pack([Segment(text) for text in ids]), "hidden").unflatten(0, ids.shape))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base that states no direction, as Gemma 3 does."""
    folder = tmp_path_factory.mktemp("gemma3")
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SHAPE)
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def with_keys(folder, to, keys):
    """A copy of a base whose config.json states more."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    facts = json.loads((folder / "config.json").read_text())
    facts.pop("use_bidirectional_attention", None)
    (to / "config.json").write_text(json.dumps(facts | keys))
    return to


@pytest.mark.parametrize(("keys", "far"), FILES.values(), ids=FILES)
@pytest.mark.parametrize("layers", ["plain", "auto"])
def test_a_file_that_states_its_direction_keeps_its_window(folder, tmp_path, keys, far, layers):
    """The three are held apart: what plain transformers sees by a file is what l2v sees, fused or not, and exports."""
    base = with_keys(folder, tmp_path / "base", keys)
    assert plain_reach(base) == plain_reach(base, "sdpa") == (far, far)
    packed = packed_of(base, layers)
    assert packed.path.layout == "packed" and packed_reach(packed) == (far, far)
    if layers == "auto":
        save_weights(packed.decoder, tmp_path / "export", keys_to_state(packed))
        assert plain_reach(tmp_path / "export") == (far, far)


@pytest.mark.parametrize("layers", ["plain", "auto"])
def test_a_base_that_states_none_takes_the_flags_window(folder, tmp_path, layers):
    """|i - j| <= w / 2, as EmbeddingGemma: in l2v, and in plain transformers on its export, save after save."""
    first = tmp_path / "0"
    packed = packed_of(folder, layers)
    assert packed.decoder.config.use_bidirectional_attention and not hasattr(packed.decoder.config, "is_causal")
    assert packed_reach(packed) == (W // 2, W // 2)
    save_weights(packed.decoder, first, keys_to_state(packed))
    for again in range(2):
        facts = json.loads((first / "config.json").read_text())
        assert (
            facts["sliding_window"] == W and facts["use_bidirectional_attention"] is True and "is_causal" not in facts
        )
        assert plain_reach(first) == plain_reach(first, "sdpa") == (W // 2, W // 2)
        packed = packed_of(first, layers)
        assert packed_reach(packed) == (W // 2, W // 2)
        first = tmp_path / str(again + 1)
        save_weights(packed.decoder, first, keys_to_state(packed))


@pytest.mark.parametrize("keys", [{}, {"use_bidirectional_attention": True}], ids=["plain", "flag"])
def test_causal_attention_has_the_whole_window_on_one_side(folder, tmp_path, keys):
    base = with_keys(folder, tmp_path / "base", keys)
    for layers in ("plain", "auto"):
        packed = packed_of(base, layers, attention="causal")
        assert packed_reach(packed) == (W - 1, 0)
    save_weights(packed.decoder, tmp_path / "export", keys_to_state(packed))
    assert plain_reach(tmp_path / "export") == (W - 1, 0)


def test_transformers_own_attention_sees_the_same(folder):
    assert packed_reach(packed_of(folder, backend="sdpa")) == (W // 2, W // 2)


@pytest.mark.parametrize("window", [1, 5, 6, 512, 4096])
@pytest.mark.parametrize("keys", [{}, *(keys for keys, _ in FILES.values())], ids=str)
def test_windows_by_override_and_again(tmp_path, window, keys):
    """An override states the window as the file does; odd ones count as the even one below, after which nothing changes."""
    even = window if keys == {"is_causal": False} else window // 2 * 2
    shape = SHAPE | keys
    by_override = load_config(
        Base(model="x", init="random", config=shape | {"sliding_window": 64}, overrides={"sliding_window": window})
    )
    in_file = load_config(Base(model="x", init="random", config=shape | {"sliding_window": window}))
    assert by_override.sliding_window == in_file.sliding_window
    for _ in range(3):
        in_file.save_pretrained(tmp_path)
        in_file = AutoConfig.from_pretrained(tmp_path)
        assert in_file.to_dict()["sliding_window"] == even
    switched = Base(model="x", init="random", config=SHAPE, overrides={"use_bidirectional_attention": True})
    assert load_config(switched).sliding_window == W // 2 + 1


def test_a_version_that_saves_the_halved_window_is_corrected(folder, tmp_path, monkeypatch):
    """transformers has not always turned it back in `to_dict`: each save and load would have halved it again."""
    packed = packed_of(folder)
    config = packed.decoder.config
    monkeypatch.setattr(type(config), "to_dict", PretrainedConfig.to_dict)
    assert config.to_dict()["sliding_window"] == W // 2 + 1
    save_weights(packed.decoder, tmp_path, keys_to_state(packed))
    assert json.loads((tmp_path / "config.json").read_text())["sliding_window"] == W
