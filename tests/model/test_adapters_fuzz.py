"""Any adapter file and any configuration: PEFT's own states, or one sentence; never a traceback."""

import json
import warnings
from dataclasses import fields

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaModel

from l2v.errors import UserError
from l2v.model.merge import merge_adapters

SHAPE = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IDS = torch.arange(1, 19)[None]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def fresh():
    torch.manual_seed(0)
    return LlamaModel(LlamaConfig(**SHAPE, initializer_range=0.2)).eval()


def states(model):
    with torch.no_grad():
        return model(input_ids=IDS)[0]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A whole adapter: its configuration, its tensors, and a folder to write others into."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    model = get_peft_model(fresh(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS), folder


NAMES = [
    "q_proj",
    "up_proj",
    "down_proj",
    "embed_tokens",
    "norm",
    "layers",
    "lm_head",
    "",
    ".*",
    "(",
    "*",
    "all-linear",
    "no_such",
]
SIMPLE = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.sampled_from([10**9, 10**400, -(10**9)]), st.floats(width=32),
    st.sampled_from([*NAMES, "pissa", "olora", "gaussian", "eva", "corda", "loftq", "LORA", "IA3", "all", "lora_only"]),
)  # fmt: skip
VALUES = st.one_of(
    SIMPLE,
    st.lists(st.sampled_from(NAMES), max_size=3),
    st.lists(SIMPLE, max_size=3),
    st.dictionaries(st.sampled_from(NAMES), SIMPLE, max_size=2),
)
KEYS = st.sampled_from(
    [*sorted({field.name for field in fields(LoraConfig)} - {"revision", "runtime_config"}), "a_new_key"]
)
LIKELY = st.fixed_dictionaries(  # what often gives an adapter that PEFT loads
    {},
    optional={
        "lora_alpha": st.integers(1, 9), "use_rslora": st.booleans(), "target_modules": st.just(["up_proj", "q_proj"]),
        "alpha_pattern": st.just({"q_proj": 3}), "layers_to_transform": st.just([0, 1]),
        "modules_to_save": st.sampled_from([None, [], ["norm"]]), "fan_in_fan_out": st.booleans(),
        "init_lora_weights": st.sampled_from([True, False, "gaussian", "pissa", "olora", "eva"]),
    },
)  # fmt: skip
CHANGES = [
    "drop",
    "empty",
    "half",
    "transposed",
    "narrow",
    "NaN",
    "whole numbers",
    "renamed",
    "more",
    "scaled",
    "double",
    "scalar",
]


@st.composite
def mutations(draw):
    changed = draw(LIKELY)
    if draw(st.booleans()):
        changed |= draw(st.dictionaries(KEYS, VALUES, max_size=2))
    tensors = draw(st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 7)), max_size=2))
    cut = draw(st.one_of(st.none(), st.none(), st.integers(0, 400)))
    return changed, tensors, cut


def change(tensors, how, at):
    """One tensor of a file, changed."""
    name = sorted(tensors)[at % len(tensors)] if tensors else None
    if name is None:
        return tensors
    tensor, rest = tensors[name], {key: value for key, value in tensors.items() if key != name}
    new = {
        "drop": {},
        "empty": {name: torch.zeros(0)},
        "half": {name: tensor.half()},
        "transposed": {name: tensor.t().contiguous() if tensor.ndim == 2 else tensor},
        "narrow": {name: tensor[:1].clone() if tensor.ndim else tensor},
        "NaN": {name: tensor * float("nan")},
        "whole numbers": {name: tensor.to(torch.int32)},
        "renamed": {name.replace("layers.1", "layers.7").replace("lora_A", "lora_C"): tensor},
        "more": {name: tensor, "base_model.model.norm.weight": torch.ones(16)},
        "scaled": {name: tensor * 0.5},
        "double": {name: tensor.double()},
        "scalar": {name: torch.tensor(1.0)},
    }
    return rest | new[how]


def check(adapter, mutation):
    config, tensors, folder = adapter
    changed, changes, cut = mutation
    for how, at in changes:
        tensors = change(tensors, how, at)
    (folder / CONFIG).write_text(json.dumps(config | changed))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if cut is not None:
        whole = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(whole[:cut])
    base = fresh()
    try:
        merged = merge_adapters(base, [str(folder)])
    except UserError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = states(PeftModel.from_pretrained(fresh(), folder).eval())
    torch.testing.assert_close(states(merged), want, rtol=1e-4, atol=1e-4)  # scales of up to 9 on random matrices
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck), "database": None}


@settings(max_examples=30, **SETTINGS)
@given(mutation=mutations())
def test_an_adapter_is_merged_as_peft_does_or_refused(adapter, mutation):
    check(adapter, mutation)


@pytest.mark.slow
@settings(max_examples=1000, **SETTINGS)
@given(mutation=mutations())
def test_a_thousand_adapters_are_merged_as_peft_does_or_refused(adapter, mutation):
    check(adapter, mutation)
