"""Stages without LoRA (`lora: null`): what they train and leave, on what later stages build, and what is refused."""

import shutil
import signal
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.processes import finish, start_ranks
from support.run_state import column, flat, part, state
from transformers import AutoModel, AutoTokenizer

from l2v import Encoder
from l2v.errors import RecipeError, UserError
from l2v.model.full import save_weights, weights_without_gradient
from l2v.model.merge import merge_adapters
from l2v.model.vocabulary import grow_embedding, rows_with
from l2v.recipe.load import load_recipe
from l2v.runs.source import find


def weights(run, stage):
    return load_file(run / stage / "model" / "model.safetensors")


def test_a_stage_that_trains_all_weights(tmp_path, tiny_recipe, tiny_config, run_here, base, sentences):
    """MNTP with a tied head, resumed bitwise; a stage with LoRA on top; an export that plain transformers reads."""
    tied = tiny_config | {"tie_word_embeddings": True}
    keys = {"lora": None, "stages.mntp.save_every": 2, "stages.mntp.keep": 9, "stages.simcse.lora": {"r": 3}}
    recipe = tiny_recipe(tmp_path, **keys, **{"base.config": tied, "stages.mntp.weight_decay": 0.1})
    run = tmp_path / "run"
    assert "mntp: done, all weights in" in run_here(recipe, "--stage", "mntp")
    trained = weights(run, "mntp")
    assert set(trained) == {name for name, _ in AutoModel.from_pretrained(run / "mntp" / "model").named_parameters()}
    first = part(state(run, "mntp", 2), "weight")
    moved = {name: (trained[name].double() - first[name]).abs().max() for name in first}
    assert set(first) == set(trained) and min(moved.values()) > 0
    assert "already trained, all weights in" in run_here(recipe, "--stage", "mntp")

    broken = tmp_path / "broken"
    shutil.copytree(run, broken)  # as a run that was killed behind step 2
    shutil.rmtree(broken / "mntp" / "model")
    shutil.rmtree(broken / "mntp" / "checkpoints" / "step-000004")
    assert "continues after step 2" in run_here(recipe, "--stage", "mntp", f"out={broken}")
    file = "mntp/model/model.safetensors"
    assert (broken / file).read_bytes() == (run / file).read_bytes()

    run_here(recipe, "--stage", "simcse")
    assert find(str(run / "simcse")).adapters == [str(run / "mntp" / "model"), str(run / "simcse" / "adapter")]
    on_top, below = Encoder.from_pretrained(run / "simcse"), Encoder.from_pretrained(run / "mntp")
    vectors = on_top.encode(sentences[:4])
    assert np.abs(vectors - below.encode(sentences[:4])).max() > 1e-4
    given = Encoder.from_pretrained(run / "mntp" / "model", adapters=[str(run / "simcse" / "adapter")])
    np.testing.assert_allclose(given.encode(sentences[:4]), vectors, rtol=0, atol=1e-6)

    for stage, encoder in (("mntp", below), ("simcse", on_top)):
        encoder.save(tmp_path / stage)
        plain = AutoModel.from_pretrained(tmp_path / stage, attn_implementation="sdpa").eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / stage)
        for text in sentences[:3]:
            ids = torch.tensor([encoder.tokenizer.embedded([text], None)[0][0]])
            with torch.no_grad():
                start = encoder.tokenizer.embedded([text], None)[1][0]
                mean = plain(input_ids=ids).last_hidden_state[0, start:].mean(0)
            ours = encoder.encode(text)
            assert np.abs(ours - (mean / mean.norm()).numpy()).max() < 1e-5 and tokenizer is not None
        names = dict(plain.named_parameters())
        same = [torch.equal(names[name], trained[name]) for name in trained]
        assert all(same) if stage == "mntp" else not all(same)


def test_the_head_that_is_tied_learns_with_the_embedding(tmp_path, tiny_recipe, tiny_config, run_here):
    """One step of MNTP equals one of transformers' own language model, whose head and embedding are one parameter."""
    found = {}
    for tie in (True, False):
        folder = tmp_path / str(tie)
        folder.mkdir()
        keys = {"lora": None, "stages.mntp.steps": 1, "base.config": tiny_config | {"tie_word_embeddings": tie}}
        run_here(tiny_recipe(folder, **keys), "--stage", "mntp")
        found[tie] = part(state(folder / "run", "mntp", 1), "exp_avg")["embed_tokens.weight"]
    rows = {tie: int(moment.abs().sum(1).gt(0).sum()) for tie, moment in found.items()}
    assert rows[True] == 300 > rows[False]  # a frozen head gives the embedding gradients of the texts' own tokens alone


DAMAGES = {
    "lacks": (lambda t: t.pop("norm.weight"), "lack 1 of 20 tensors, for example norm.weight; train the stage again"),
    "another shape": (lambda t: t.update({"norm.weight": torch.zeros(7)}), r"norm.weight [7] does not fit this base"),
    "surplus": (lambda t: t.update({"more": torch.zeros(2)}), "its tensor more [2] does not fit this base"),
}


@pytest.fixture(scope="module")
def left(tmp_path_factory, base):
    """A folder as such a stage leaves it."""
    folder = tmp_path_factory.mktemp("left") / "model"
    inner = AutoModel.from_pretrained(base)
    save_weights(inner, dict(inner.named_parameters()), folder, {"base": {"model": str(base)}, "merged": []})
    return folder


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_weights_are_one_sentence(tmp_path, left, damage, sentence):
    folder = tmp_path / "model"
    shutil.copytree(left, folder)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError) as error:
        Encoder.from_pretrained(folder)
    assert sentence in str(error.value)


def test_damaged_files_are_one_sentence(tmp_path, left, base, sentences):
    folder = tmp_path / "model"
    shutil.copytree(left, folder)
    same = Encoder.from_pretrained(folder).encode(sentences[:2])
    np.testing.assert_allclose(same, Encoder.from_pretrained(base).encode(sentences[:2]), rtol=0, atol=1e-6)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"model.safetensors: damaged: .*train the stage again with --fresh"):
        Encoder.from_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config.json: damaged; train the stage again"):
        Encoder.from_pretrained(folder)
    (folder / "lineage.json").write_text("{")
    with pytest.raises(UserError, match=r"lineage.json: damaged"):
        find(str(folder))


def test_rows_of_new_tokens_are_kept(tmp_path, base):
    """A stage on top of one that trained new tokens leaves an embedding with more rows than the base."""
    inner = AutoModel.from_pretrained(base)
    grow_embedding(inner, 303)
    torch.nn.init.normal_(inner.get_input_embeddings().weight)
    save_weights(
        inner, dict(inner.named_parameters()), tmp_path / "model", {"base": {"model": str(base)}, "merged": []}
    )
    assert rows_with([str(tmp_path / "model")], 300) == 303
    merged = dict(merge_adapters(AutoModel.from_pretrained(base), [str(tmp_path / "model")]).named_parameters())
    assert all(torch.equal(merged[name], parameter) for name, parameter in inner.named_parameters())
    assert len(merged["embed_tokens.weight"]) == 303


REFUSED = {
    "fp8": ({"lora": None, "base.base_precision": "fp8"}, "base.base_precision: fp8 freezes the weights that stage 'mntp'"),
    "nf4, one stage": (
        {"stages.supervised.lora": None, "base.base_precision": "nf4"},
        "base.base_precision: nf4 freezes the weights that stage 'supervised' trains (lora: null); use base.base_precision: same",
    ),
    "no dropout": (
        {"lora": None, "stages.simcse.attention_dropout": 0},
        "without any dropout the two views are the same, and lora: null has none of its own; set attention_dropout",
    ),
    "a word": ({"lora": "none"}, "lora is a mapping of keys; found 'none'"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_combined_is_one_sentence(tmp_path, tiny_recipe, keys, sentence):
    with pytest.raises(RecipeError) as error:
        load_recipe(str(tiny_recipe(tmp_path, **keys)))
    assert sentence in str(error.value)


def test_a_recipe_and_its_stages_choose_apart(tmp_path, tiny_recipe):
    recipe = load_recipe(str(tiny_recipe(tmp_path, **{"stages.mntp.lora": None})))
    assert recipe.stages["mntp"].lora is None and recipe.stages["simcse"].lora.r == 4
    recipe = load_recipe(str(tiny_recipe(tmp_path, lora=None)), ["stages.simcse.lora.r=2"])
    assert recipe.lora is recipe.stages["mntp"].lora is None
    assert (recipe.stages["simcse"].lora.r, recipe.stages["simcse"].lora.alpha) == (2, 32)
    assert load_recipe(str(tiny_recipe(tmp_path)), ["lora=null"]).stages["supervised"].lora is None


def test_a_run_keeps_its_choice(tmp_path, tiny_recipe, run_here):
    recipe = tiny_recipe(tmp_path, **{"stages.mntp.steps": 1})
    run_here(recipe, "--stage", "mntp", "lora=null")
    said = run_here(recipe, "--stage", "mntp", expect=1)
    assert "stages.mntp.lora was null and is now a mapping of keys; use stages.mntp.lora=null, or" in said
    assert "Traceback" not in said


def test_weights_that_no_text_reaches_are_named():
    layers = torch.nn.ModuleDict({"used": torch.nn.Linear(2, 2), "expert": torch.nn.Linear(2, 2)})
    assert weights_without_gradient(layers, layers["used"](torch.ones(1, 2)).sum()) == ["expert.weight", "expert.bias"]


SMOLLM2 = {
    "lora": "null", "base.precision": "fp32", "tracking.tensorboard": "false", "mntp.steps": 3, "mntp.batch": 5,
    "mntp.length": 48, "mntp.micro_tokens": 96, "mntp.lr": 1e-5, "mntp.eval_data": "[]", "mntp.save_every": 1, "mntp.keep": 3,
    "mntp.log_every": 1, "mntp.clip": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """smollm2(world, zero) -> ranks that train all weights of SmolLM2 on the sample, and their run's folder."""
    folder = tmp_path_factory.mktemp("smollm2")

    def start(world, zero, name, **more):  # a checkpoint takes 1.6 GB
        keys = [
            f"{key}={value}" for key, value in (SMOLLM2 | {f"mntp.{key}": value for key, value in more.items()}).items()
        ]
        arguments = ["smollm2-135m-da", "--stage", "mntp", f"out={folder / name}", f"zero.stage={zero}", *keys]
        return start_ranks([arguments] * world), folder / name

    return start


@pytest.fixture(scope="module")
def one(smollm2):
    """The run of one rank."""
    ranks, run = smollm2(1, 1, "one")
    finish(ranks, timeout=1800)
    shutil.rmtree(run / "mntp" / "checkpoints" / "step-000002")
    yield run
    shutil.rmtree(run)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "zero"), [(2, 1), (2, 2), (2, 3)], ids=lambda n: str(n))
def test_smollm2_on_several_ranks_equals_one(smollm2, one, world, zero):
    """DESIGN's parity: gradients to 1e-5 of the largest, losses to 1e-5, the movement of the weights to 1e-3."""
    ranks, several = smollm2(world, zero, f"zero{zero}x{world}")
    finish(ranks, timeout=1800)
    gradient_one, gradient_several = (flat(part(state(run, "mntp", 1), "exp_avg")) for run in (one, several))
    assert gradient_one.numel() == 134_515_008 and gradient_one.abs().max() > 0
    assert (gradient_one - gradient_several).abs().max() <= 1e-5 * gradient_one.abs().max()
    torch.testing.assert_close(column(one, "mntp"), column(several, "mntp"), rtol=1e-5, atol=0)
    norms_one, norms_several = (column(run, "mntp", "gradient_norm") for run in (one, several))
    # Later norms are those of a decoder that has just lost its mask: in the hundreds, they enlarge the rounding of the loss.
    torch.testing.assert_close(norms_one[0], norms_several[0], rtol=1e-4, atol=0)
    del gradient_one, gradient_several
    first, last = (flat(part(state(one, "mntp", step), "weight")) for step in (1, 3))
    other = flat(part(state(several, "mntp", 3), "weight"))
    difference, moved = (last - other).norm(), (last - first).norm()
    print(f"SmolLM2 zero {zero} x {world}: weights moved by {moved:.3e}, apart by {difference:.3e}")
    assert difference <= 1e-3 * moved
    shutil.rmtree(several)


@pytest.mark.slow
def test_smollm2_killed_and_resumed_is_the_same_to_the_bit(smollm2, tmp_path, sentences):
    """Two ranks under ZeRO 2, killed behind the first checkpoint; the export equals transformers'."""
    ranks, whole = smollm2(2, 2, "whole", keep=1)
    finish(ranks, timeout=1800)
    shutil.rmtree(whole / "mntp" / "checkpoints")
    ranks, broken = smollm2(2, 2, "broken", keep=1)
    deadline = time.monotonic() + 1800
    while not list(broken.glob("mntp/checkpoints/step-*")):
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
        time.sleep(0.01)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
        rank.communicate()
    assert not (broken / "mntp" / "model").exists()
    assert "continues after step" in finish(smollm2(2, 2, "broken", keep=1)[0], timeout=1800)[0]
    file = "mntp/model/model.safetensors"
    assert (whole / file).read_bytes() == (broken / file).read_bytes()
    shutil.rmtree(whole)
    encoder = Encoder.from_pretrained(broken / "mntp", precision="fp32")
    encoder.save(tmp_path / "export")
    plain = AutoModel.from_pretrained(tmp_path / "export", attn_implementation="sdpa", dtype=torch.float32).eval()
    for text in sentences[:3]:
        ids, starts, _ = encoder.tokenizer.embedded([text], None)
        with torch.no_grad():
            mean = plain(input_ids=torch.tensor(ids)).last_hidden_state[0, starts[0] :].mean(0)
        assert np.abs(encoder.encode(text) - (mean / mean.norm()).numpy()).max() < 1e-5
    shutil.rmtree(broken)


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "precision"), [(1, "fp32"), (3, "bf16")])
def test_tiny_ranks_killed_and_resumed_are_the_same_to_the_bit(tmp_path, tiny_recipe, zero, precision):
    every = {"steps": 40, "save_every": 3, "from": "base", "lora": None, "weight_decay": 0.01}
    changes = {f"stages.simcse.{key}": value for key, value in every.items()}
    recipe = tiny_recipe(tmp_path, **changes, **{"base.precision": precision, "zero.stage": zero})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start_ranks([[recipe, "--stage", "simcse", f"out={whole}"]] * 2))
    ranks = start_ranks([[recipe, "--stage", "simcse", f"out={broken}"]] * 2)
    deadline = time.monotonic() + 300
    while not list(broken.glob("simcse/checkpoints/step-*")):
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
        time.sleep(0.01)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
        rank.communicate()
    said = finish(start_ranks([[recipe, "--stage", "simcse", f"out={broken}"]] * 2))[0]
    assert "simcse: continues after step" in said
    file = "simcse/model/model.safetensors"
    assert (whole / file).read_bytes() == (broken / file).read_bytes()
