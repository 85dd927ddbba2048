"""Exports as other engines read them: the same vectors, or a refusal that names the engine."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from support.engine_rules import OldVllm, Refused, Tei, Vllm
from support.made_run import make_run
from tokenizers import Tokenizer, models, processors
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from l2v import Encoder
from l2v.commands import main as cli
from l2v.data.tokens import TextTokenizer, load_tokenizer
from l2v.errors import UserError
from l2v.model import export_tokenizer
from l2v.model.engines import reports
from l2v.recipe import Template
from l2v.recipe.instructions import Instructions

RULES = {"tei": [Tei], "vllm": [Vllm, OldVllm]}
TEXTS = ["Hunden løber gennem skoven.", "a", "3 æbler på Ærø 🙂", "en lang tekst om byen " * 9]
LENGTH = 40


@pytest.fixture(scope="module")
def bases(tmp_path_factory, base, bos_tokenizer_folder, tiny_config):
    """bases(family) -> a folder with random weights of that family, without a pad token."""
    made = {}

    def of(family: str) -> Path:
        if family not in made:
            folder = made[family] = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            shape = tiny_config | {"model_type": family, "initializer_range": 0.2, "head_dim": 8, "pad_token_id": None}
            shape |= {"vocab_size": tiny_config["vocab_size"] + 4}  # Qwen's tokenizer adds a token
            shape |= {"layer_types": None} if family.startswith("qwen") else {}
            shape |= {"sliding_window": None} if family == "mistral" else {}
            if family == "gemma3_text":
                shape |= {
                    "layer_types": ["sliding_attention", "full_attention"],
                    "query_pre_attn_scalar": 8,
                    "pad_token_id": 2,
                }
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.float32)
            model.save_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(bos_tokenizer_folder)
            tokenizer.pad_token, tokenizer.truncation_side = None, "left"
            tokenizer.save_pretrained(folder)
        return made[family]

    return of


@pytest.fixture(scope="module")
def served(bases, tmp_path_factory):
    """An encoder that pools its prompt, with a template that ends in EOS, and its export."""
    encoder = Encoder.from_pretrained(
        bases("llama"), precision="fp32", length=LENGTH, pool_prompt=True, template=Template(suffix="</s>")
    )
    encoder.matryoshka = [8, 16]
    folder = tmp_path_factory.mktemp("served") / "export"
    encoder.save(folder, ["tei", "vllm"])
    return encoder, folder


def off(engine, expected: np.ndarray, **options) -> float:
    return float(np.abs(engine.encode(TEXTS, **options).numpy() - expected).max())


@pytest.mark.parametrize(
    ("family", "pooling"),
    [
        ("llama", "mean"),
        ("llama", "last"),
        ("llama", "first"),
        ("qwen2", "mean"),
        ("qwen3", "mean"),
        ("mistral", "mean"),
    ],
)
def test_engines_that_pool_everything_give_the_vectors_or_are_refused_by_name(bases, tmp_path, family, pooling):
    template = Template(suffix="</s>")
    encoder = Encoder.from_pretrained(
        bases(family), precision="fp32", length=LENGTH, pool_prompt=True, pooling=pooling, template=template
    )
    found = {engine.name: engine for engine in encoder.save(tmp_path / "out")}
    expected = encoder.encode(TEXTS)
    for name, rules in RULES.items():
        for rule in rules:
            apart = off(rule(tmp_path / "out"), expected)
            assert apart < 1e-5 if not found[name].refused else apart > 1e-3, (rule, found[name])
    assert bool(found["vllm"].refused) == (family == "mistral")  # which vLLM runs causally
    assert not found["tei"].refused


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            {"template": Template(prefix="spørg: ")},
            "'spørg: <s>' before each text is not pooled; train with pool_prompt: true",
        ),
        ({}, "'<s>' before each text is not pooled"),
        ({"pooling": "weighted_mean", "pool_prompt": True}, "it has no pooling 'weightedmean'"),
    ],
    ids=["header", "bos", "weighted mean"],
)
def test_what_an_engine_cannot_represent_is_refused_by_its_name(bases, tmp_path, options, why):
    encoder = Encoder.from_pretrained(bases("llama"), precision="fp32", length=LENGTH, **options)
    for engine in ("tei", "vllm"):
        with pytest.raises(UserError, match=f"^{engine} cannot serve this encoder: .*{why}"):
            encoder.save(tmp_path / "out", [engine])
        assert not list(tmp_path.iterdir())
    encoder.save(tmp_path / "out", ["transformers", "sentence-transformers"])
    for rules in (Tei, Vllm):
        try:
            assert off(rules(tmp_path / "out"), encoder.encode(TEXTS)) > 1e-3
        except Refused as error:
            assert "pooling" in str(error)


@pytest.mark.parametrize(
    ("rules", "file", "key"),
    [
        (Tei, "1_Pooling/config.json", "pooling_mode_cls_token"),
        (Tei, "1_Pooling/config.json", "pooling_mode_mean_tokens"),
        (Tei, "config.json", "use_bidirectional_attention"),
        (Tei, "config.json", "rope_theta"),
        (Tei, "config.json", "architectures"),
        (Tei, "sentence_bert_config.json", "max_seq_length"),
        (OldVllm, "1_Pooling/config.json", "pooling_mode_mean_tokens"),
        (Vllm, "config.json", "is_causal"),
        (Vllm, "config.json", "matryoshka_dimensions"),
    ],
)
def test_every_key_is_needed(served, tmp_path, rules, file, key):
    """With it the engine gives the vectors, without it it fails or gives others."""
    encoder, export = served
    assert off(rules(export), encoder.encode(TEXTS, dimensions=8), dimensions=8) < 1e-5
    shutil.copytree(export, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / file).read_text())
    del facts[key]
    (tmp_path / "out" / file).write_text(json.dumps(facts))
    with suppress(Refused, KeyError):
        assert off(rules(tmp_path / "out"), encoder.encode(TEXTS, dimensions=8), dimensions=8) > 1e-3


def gemma3(bases, folder, **config):
    """An encoder of a random Gemma 3 with these keys in its file, and its export."""
    base = shutil.copytree(bases("gemma3_text"), folder / "base")
    facts = json.loads((base / "config.json").read_text())
    facts.pop("use_bidirectional_attention")
    (base / "config.json").write_text(json.dumps(facts | config))
    template = Template(suffix="</s>")
    encoder = Encoder.from_pretrained(base, precision="fp32", length=LENGTH, pool_prompt=True, template=template)
    return encoder, {report.name: report for report in encoder.save(folder / "out")}, folder / "out"


@pytest.mark.parametrize("window", [16, 80])
def test_gemma_3_states_its_direction_by_its_own_flag_alone(bases, tmp_path, window):
    """Texts are longer than the smaller window and its half. Plain transformers, vLLM and TEI see what l2v sees."""
    encoder, found, export = gemma3(bases, tmp_path, sliding_window=window)
    facts = json.loads((export / "config.json").read_text())
    assert facts["use_bidirectional_attention"] is True and "is_causal" not in facts
    assert (facts["sliding_window"], facts["_sliding_window_pattern"]) == (window, 2)
    assert (facts["rope_theta"], facts["rope_local_base_freq"]) == (1e6, 1e4)
    expected = encoder.encode(TEXTS)
    tokenizer, model = AutoTokenizer.from_pretrained(export), AutoModel.from_pretrained(export).eval()
    for text, vector in zip(TEXTS, expected, strict=True):
        ids = tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt")
        pooled = torch.nn.functional.normalize(model(**ids)[0][0].mean(0), dim=-1)
        assert np.abs(pooled.detach().numpy() - vector).max() < 1e-5
    assert not found["vllm"].refused and off(Vllm(export), expected) < 1e-5
    assert off(Tei(export), expected) < 1e-5
    assert ("--length 9" in found["tei"].refused) if window == 16 else not found["tei"].refused


@pytest.mark.parametrize("both", [False, True])
def test_a_gemma_3_that_states_is_causal_keeps_it_and_is_refused_elsewhere(bases, tmp_path, both):
    """Its window is another one there."""
    keys = {"is_causal": False} | ({"use_bidirectional_attention": True} if both else {})
    encoder, found, export = gemma3(bases, tmp_path, sliding_window=16, **keys)
    facts = json.loads((export / "config.json").read_text())
    assert facts["is_causal"] is False and bool(facts.get("use_bidirectional_attention")) == both
    assert facts["sliding_window"] == 16
    expected = encoder.encode(TEXTS)
    for name, rule in (("vllm", Vllm), ("tei", Tei)):
        assert found[name].refused and off(rule(export), expected) > 1e-3


@pytest.mark.parametrize("key", ["rope_local_base_freq", "rope_theta", "pad_token_id", "_sliding_window_pattern"])
def test_every_key_of_gemma_3_is_needed(bases, tmp_path, key):
    _, found, export = gemma3(bases, tmp_path, sliding_window=80)
    assert not found["tei"].refused
    facts = json.loads((export / "config.json").read_text())
    del facts[key]
    (export / "config.json").write_text(json.dumps(facts))
    with pytest.raises(Refused, match=key):
        Tei(export)
    assert key in next(report for report in reports(export) if report.name == "tei").refused


def test_layers_of_gemma_3_without_a_pattern_are_refused_for_tei(bases, tmp_path):
    kinds = ["full_attention", "sliding_attention"]  # of which none is every n-th
    _, found, export = gemma3(bases, tmp_path, sliding_window=80, layer_types=kinds)
    assert "_sliding_window_pattern" not in json.loads((export / "config.json").read_text())
    assert "_sliding_window_pattern" in found["tei"].refused and not found["vllm"].refused


def test_dimensions_that_were_not_trained_are_refused_by_vllm(served):
    with pytest.raises(Refused, match=r"only \[8, 16\] dimensions"):
        Vllm(served[1]).encode(TEXTS, dimensions=12)


def test_matryoshka_lengths_of_a_recipe_reach_the_export(tiny_recipe, tmp_path):
    run = make_run(tiny_recipe(tmp_path, **{"stages.supervised.matryoshka": [4, 32]}))
    encoder = Encoder.from_pretrained(run / "supervised")
    assert encoder.matryoshka == [4, 32] and Encoder.from_pretrained(run / "mntp").matryoshka == []
    encoder.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["matryoshka_dimensions"] == [4, 32]
    assert Encoder.from_pretrained(tmp_path / "out").matryoshka == [4, 32]


def test_the_tokenizer_is_for_every_reader(served):
    """A class that transformers 4 knows, nothing of this machine, padding, and the end of a text cut."""
    facts = json.loads((served[1] / "tokenizer_config.json").read_text())
    assert facts["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"backend", "is_local", "local_files_only", "add_bos_token", "add_eos_token"} & set(facts)
    tokenizer = AutoTokenizer.from_pretrained(served[1])
    assert tokenizer.pad_token == "</s>" and tokenizer.model_max_length == LENGTH
    for text in TEXTS:
        ids = tokenizer(text, truncation=True)["input_ids"]
        assert ids == served[0].tokenizer.embedded([text])[0][0]
        assert [ids.count(id) for id in (tokenizer.bos_token_id, tokenizer.eos_token_id)] == [1, 1]
        assert ids[-1] == tokenizer.eos_token_id and len(ids) <= LENGTH


@pytest.mark.parametrize(("after", "fault"), [(["</s>", "</s>"], "twice"), ([], "dropped")])
def test_a_post_processor_that_puts_eos_twice_or_drops_it_is_caught(served, tmp_path, monkeypatch, after, fault):
    template = processors.TemplateProcessing(
        single=["<s>", "$A", *after], pair=["$A", "$B"], special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    monkeypatch.setattr(export_tokenizer, "_processor", lambda *_: template)
    with pytest.raises(UserError, match=r"cannot be exported: .* has the tokens .* instead of"):
        served[0].save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ends", ["bos and eos", "eos alone", "none"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize(
    "template", [Template(), Template(prefix="<pad>user\n"), Template(prefix="søg: ", suffix="<pad>")]
)
def test_what_a_tokenizer_adds_stays_as_it_was_trained(tokenizer_folder, tmp_path, ends, pooling, template):
    """Ids and the tokens that are pooled, for every text, as sentence-transformers counts a prompt; or a sentence."""
    tokenizer = load_tokenizer(tokenizer_folder)
    single = {"bos and eos": "<s> $A </s>", "eos alone": "$A </s>", "none": "$A"}[ends]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    texts = TextTokenizer(tokenizer, template, 32)
    asked = "Find den tekst, der svarer:"
    if pooling == "mean" and template.suffix and ends != "none":
        with pytest.raises(UserError, match="counts one special token behind a prompt"):
            export_tokenizer.write_tokenizer(texts, pooling, [asked], tmp_path)
        return
    framed = export_tokenizer.write_tokenizer(texts, pooling, [asked], tmp_path)
    for text in ("du ser hunden", "3", "🙂 ja", "Ærø " * 40):
        for instruction in (None, asked):
            (ids,), (start,), _ = texts.embedded([text], instruction)
            prompt = TextTokenizer(framed.tokenizer, framed.template, 32).header(instruction)
            theirs = framed.tokenizer(prompt + text, truncation=True, max_length=32)["input_ids"]
            assert theirs == ids
            assert not framed.exclude or export_tokenizer._prompt_length(framed.tokenizer, prompt) == start


def test_instructions_of_several_tasks_have_prompts_by_their_names(bases, tmp_path):
    asked = ("Find den tekst, der besvarer spørgsmålet:", "Find den tekst, som overskriften hører til:")
    encoder = Encoder.from_pretrained(bases("llama"), precision="fp32", template=Template(prefix="søg: "))
    encoder.instructions = Instructions(asked, ("",))
    encoder.save(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config_sentence_transformers.json").read_text())
    prompts = {"question-da": f"søg: {asked[0]} ", "title-da": f"søg: {asked[1]} "}
    assert found["prompts"] == prompts | {"query": "søg: ", "document": "søg: "}


def test_sentence_transformers_excludes_the_prompt_of_every_text(bases, tmp_path):
    """Also where a text begins with a character whose token has no space in it."""
    from sentence_transformers import SentenceTransformer

    asked = "Find den tekst, der svarer:"
    encoder = Encoder.from_pretrained(
        bases("llama"), precision="fp32", template=Template(prefix="<pad>user\n", suffix="</s>")
    )
    encoder.instructions = Instructions((asked,), ("",))
    encoder.save(tmp_path / "out")
    texts = ["du ser hunden", "3 hunde", "🙂", "Ærø", "ser"]
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_allclose(theirs.encode_query(texts), encoder.encode_query(texts), atol=1e-5)
    np.testing.assert_allclose(theirs.encode(texts), encoder.encode(texts), atol=1e-5)


@pytest.mark.parametrize(
    ("template", "pool_prompt", "since"),
    [
        (Template(prefix="spørg:\n"), False, "5.4"),
        (Template(instruction="{instruction}\n"), False, "5.4"),
        (Template(prefix="spørg: "), False, "5.3"),
        (Template(prefix="spørg:\n"), True, "5.3"),
    ],
    ids=["header", "instruction", "space", "pooled"],
)
def test_a_prompt_that_sentence_transformers_5_3_counts_without_its_end_fails_there(
    bases, tmp_path, template, pool_prompt, since
):
    """By the name of the width, which it does not know."""
    encoder = Encoder.from_pretrained(bases("llama"), precision="fp32", template=template, pool_prompt=pool_prompt)
    found = {report.name: report for report in encoder.save(tmp_path / "out")}
    assert f"from version {since} " in found["sentence-transformers"].vectors
    pooling = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())
    assert ("embedding_dimension" in pooling, "word_embedding_dimension" in pooling) == (since == "5.4", since == "5.3")


def test_older_versions_of_transformers_fail_with_a_sentence(served):
    """They turn the keys of pruned_heads into numbers (`PretrainedConfig.from_dict` of 4.57); version 5 has no such key."""
    facts = json.loads((served[1] / "config.json").read_text())
    with pytest.raises(ValueError, match=r"needs transformers 5\.2 or newer \(pip install .*other vectors"):
        {int(key): value for key, value in facts["pruned_heads"].items()}
    again = AutoConfig.from_pretrained(served[1])
    assert again.is_causal is False and again.rope_parameters["rope_theta"] == facts["rope_theta"]


def test_the_command_prints_which_engine_gives_what(bases, tmp_path, capsys):
    assert cli.main(["export", str(bases("llama")), str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "vllm                   not for it: it pools every token" in out
    assert "sentence-transformers  those of l2v in float32" in out
    assert cli.main(["export", str(bases("llama")), str(tmp_path / "other"), "--for", "tei,vlm"]) == 1
    assert "no engine 'vlm'; did you mean 'vllm'?" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert [engine.name for engine in reports(tmp_path / "out")] == [
        "transformers",
        "sentence-transformers",
        "vllm",
        "tei",
    ]


def test_a_tokenizer_without_eos_is_padded_with_another_token():
    """Not with BOS, which is the prompt of such an export, and refused where there is no other."""
    for others, found in ((["<x>"], "<x>"), ([], None)):
        vocabulary = {"<s>": 0} | {token: at for at, token in enumerate(others, 1)} | {"a": 2, "b": 3}
        own = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
        own.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", additional_special_tokens=others)
        before = [0]
        if found is None:
            with pytest.raises(UserError, match="no token to pad a batch with"):
                export_tokenizer._pad_token(tokenizer, before)
        else:
            assert export_tokenizer._pad_token(tokenizer, before) == found


def test_instructions_of_the_rows_are_not_pooled_either(bases, tmp_path):
    encoder = Encoder.from_pretrained(bases("llama"), precision="fp32", template=Template(prefix=""), pooling="mean")
    encoder.tokenizer.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    assert not {engine.name: engine.refused for engine in encoder.save(tmp_path / "plain")}["vllm"]
    encoder.instructions = Instructions(("",), ("",), ("query",))
    refused = {engine.name: engine.refused for engine in encoder.save(tmp_path / "asked")}
    assert "the instruction is not pooled" in refused["vllm"] and "the instruction is not pooled" in refused["tei"]
