"""The public face: vectors that depend on their text alone, exports that others load, adapters that travel."""

import copy
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from l2v import Encoder
from l2v.encoder import windows
from l2v.errors import Notice, UserError
from l2v.model.packed import PackedDecoder
from l2v.recipe import Template
from l2v.recipe.instructions import Instructions

GOLDEN = Path(__file__).parent / "golden"
TEMPLATE = Template(prefix="spørg: ", suffix="</s>")


@pytest.fixture(scope="module")
def encoder(base) -> Encoder:
    return Encoder.from_pretrained(base, template=TEMPLATE, precision="fp32")


def test_neighbours_do_not_matter(encoder, sentences):
    texts = [f"{a} {b}" if i % 3 else a for i, (a, b) in enumerate(zip(sentences[:64], sentences[64:128], strict=True))]
    together = encoder.encode(texts)
    for i in (0, 1, 31, 63):
        assert np.abs(encoder.encode(texts[i]) - together[i]).max() <= 1e-6
    assert np.abs(encoder.encode(texts, batch_tokens=64) - together).max() <= 1e-6
    assert np.abs(encoder.encode(texts[::-1])[::-1] - together).max() <= 1e-6
    assert together.dtype == np.float32 and together.shape == (64, 32)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_on_a_gpu_weights_with_one_input_are_one_matmul(base, encoder, sentences, monkeypatch, tmp_path):
    """Vectors, memory and the exported files stay what they are. On a CPU weights stay mapped from their file."""

    def groups(of: Encoder) -> list[bool]:
        pairs = [(spec.qkv, spec.gate_up) for spec in of.model.fused.specs]
        return [group.linears().stacked_OE is not None for pair in pairs for group in pair]

    def storage(of: Encoder) -> int:
        held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in of.model.parameters()}
        return sum(held.values())

    monkeypatch.setattr("l2v.encoder.device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(PackedDecoder, "to", lambda model, _: model)
    stacked = Encoder.from_pretrained(base, template=TEMPLATE, precision="fp32")
    monkeypatch.undo()
    assert groups(stacked) == [True] * 4 and groups(encoder) == [False] * 4
    assert np.abs(stacked.encode(sentences[:40]) - encoder.encode(sentences[:40])).max() <= 1e-6
    assert storage(stacked) <= sum(x.numel() * x.element_size() for x in stacked.model.parameters())
    stacked.save(tmp_path / "stacked")
    encoder.save(tmp_path / "apart")
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in ("stacked", "apart")}) == 1


def test_instruction_is_read_and_not_pooled(encoder):
    text = "Hunden løber gennem skoven."
    plain, instructed = encoder.encode(text), encoder.encode(text, instruction="Find dyret")
    assert np.abs(plain - instructed).max() > 1e-4
    ids, starts, _ = encoder.tokenizer.embedded([text], "Find dyret")
    assert encoder.tokenizer.tokenizer.decode(ids[0][starts[0] :]).strip() == text + "</s>"


def test_dimensions_cut_before_they_normalise(encoder, sentences):
    whole = encoder.encode(sentences[:5], normalize=False)
    np.testing.assert_array_equal(encoder.encode(sentences[:5], normalize=False, dimensions=8), whole[:, :8])
    short = encoder.encode(sentences[:5], dimensions=8)
    np.testing.assert_allclose(short, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), atol=1e-6)
    assert encoder.encode(sentences[0], dimensions=1).shape == (1,)
    np.testing.assert_array_equal(encoder.encode(sentences[:5], dimensions=32), encoder.encode(sentences[:5]))


@pytest.mark.parametrize("dimensions", [0, -1, 33, 8.0, "8", True])
def test_dimensions_that_are_none(encoder, dimensions):
    with pytest.raises(UserError, match=f"dimensions is {dimensions}; give a whole number from 1 to 32"):
        encoder.encode("Hunden", dimensions=dimensions)


def test_batch_size_bounds_the_texts_of_a_forward(encoder, sentences, monkeypatch):
    sizes, embed = [], Encoder.embed
    monkeypatch.setattr(Encoder, "embed", lambda self, batch: sizes.append(len(batch.lengths)) or embed(self, batch))
    whole = encoder.encode(sentences[:20])
    assert sizes == [20]
    np.testing.assert_allclose(encoder.encode(sentences[:20], batch_size=6), whole, atol=1e-6)
    assert sizes[1:] == [6, 6, 6, 2]
    encoder.encode(sentences[:20], batch_size=6, batch_tokens=60)  # whichever bound is reached first
    assert max(sizes[5:]) <= 6 and len(sizes) > 9


def test_the_first_vectors_come_before_the_last_text_is_tokenized(encoder, monkeypatch):
    """However many texts there are; and windows change neither a vector nor the count of texts that are cut."""
    texts = [f"Nummer {i}: {'køerne græsser på marken ved åen ' * (i % 7)}" for i in range(150)]
    known, seen = [], []
    embedded, embed = encoder.tokenizer.embedded, Encoder.embed
    monkeypatch.setattr(encoder.tokenizer, "embedded", lambda some, *a: known.extend(some) or embedded(some, *a))
    monkeypatch.setattr(Encoder, "embed", lambda self, batch: seen.append(len(known)) or embed(self, batch))
    found = encoder.encode(texts, batch_tokens=100)
    assert known == texts and seen[0] < 30 and seen[-1] == 150
    monkeypatch.undo()
    np.testing.assert_allclose(found, encoder.encode(texts, batch_tokens=100_000), atol=1e-6)
    short = copy.copy(encoder)
    short.tokenizer = copy.copy(encoder.tokenizer)
    short.max_length = 24
    with pytest.warns(Notice, match=r"^\d+ of 150 texts are longer than 24 tokens") as warned:
        short.encode(texts, batch_tokens=60)
    assert len(warned) == 1


@pytest.mark.parametrize(
    ("characters", "budget", "found"),
    [
        ([], 5, []),
        ([1000, 1000, 1], 5, [(0, 1), (1, 2), (2, 3)]),
        ([20, 20, 1, 600, 1], 5, [(0, 2), (2, 5)]),
        ([30] * 30, 5, [(0, 1), (1, 22), (22, 30)]),
    ],
)
def test_windows_begin_small_and_hold_every_text_once(characters, budget, found):
    """Of 2 forwards' characters, 40 here, and then of 640; a text that is larger has its own."""
    assert [(w.start, w.stop) for w in windows(characters, budget)] == found


EMPTY = ["", "Hunden løber.", None, " \n", "En kat."]


def test_empty_texts(encoder):
    full = encoder.encode([EMPTY[1], EMPTY[4]])
    zeros = encoder.encode(EMPTY, empty="zeros")
    assert zeros.shape == (5, 32) and not zeros[[0, 2, 3]].any()
    np.testing.assert_allclose(zeros[[1, 4]], full, atol=1e-6)
    np.testing.assert_allclose(encoder.encode(EMPTY, empty="skip"), full, atol=1e-6)
    assert encoder.encode(["", None], empty="zeros").shape == (2, 32) and encoder.encode("", empty="zeros").shape == (
        32,
    )
    assert encoder.encode([" "], empty="skip").shape == encoder.encode([], empty="error").shape == (0, 32)


def test_similarity_is_the_cosine(encoder, sentences):
    a_NE, b_ME = encoder.encode(sentences[:3], normalize=False), encoder.encode(sentences[1:6]) * 7
    lengths = np.linalg.norm(a_NE, axis=1)[:, None] * np.linalg.norm(b_ME, axis=1)
    found = encoder.similarity(a_NE, b_ME)
    assert found.dtype == np.float32 and found.shape == (3, 5) and found[1, 0] == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(found, a_NE @ b_ME.T / lengths, atol=1e-6)
    assert encoder.similarity(a_NE[0], b_ME[0]).shape == (1, 1)
    assert not encoder.similarity(np.zeros((1, 32)), b_ME).any()
    with pytest.raises(UserError, match=r"vectors of one width; found shapes \(3, 32\) and \(5, 31\)"):
        encoder.similarity(a_NE, b_ME[:, 1:])


def test_texts_that_are_cut_are_counted(base, sentences):
    encoder = Encoder.from_pretrained(base, precision="fp32", length=100)
    long = " ".join(sentences[:30])
    with pytest.warns(Notice, match=r"^2 of 3 texts are longer than 100 tokens and were cut; max_length \(") as seen:
        cut = encoder.encode([long, "kort", long + "!"])
    assert seen[0].filename == __file__ and encoder.truncated == 2
    encoder.max_length = 2000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.abs(encoder.encode([long, "kort"]) - cut[:2]).max(axis=1)[0] > 1e-3
    assert encoder.max_length == 2000
    for wrong in (0, -3, 2.5, True, "9"):
        with pytest.raises(UserError, match=f"the length of a text in tokens is {wrong}; give a whole number from 1"):
            encoder.max_length = wrong
    with pytest.raises(UserError, match="length of a text in tokens is 0"):
        Encoder.from_pretrained(base, length=0)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda e: e.encode(["a", "b", "en halv \udc9d"]),
            r"text 2 holds half of a surrogate pair ('\udc9d', character 9)",
        ),
        (
            lambda e: e.encode("a", "\ud800 find"),
            r"the instruction holds half of a surrogate pair ('\ud800', character 1)",
        ),
        (lambda e: e.encode(["a", 7.5]), "text 1 is no text; found float"),
        (lambda e: e.encode(["a", float("nan")], empty="zeros"), "text 1 is no text; found float"),
        (lambda e: e.encode(8), "encode takes a text or several texts; found int"),
        (lambda e: e.encode(["a", "b"], ["find", "søg"]), "the instruction is no text; found list"),
        (lambda e: e.encode(["a", None]), "text 1 is NoneType; an empty text has no embedding"),
        (lambda e: e.encode(["a"], empty="drop"), "empty is 'drop'; use error, zeros or skip"),
        (lambda e: e.encode(["a"], batch_size=0), "batch_size is 0; give a whole number from 1"),
        (lambda e: e.encode(["a"], batch_tokens=-1), "batch_tokens is -1; give a whole number from 1"),
    ],
)
def test_what_is_no_text_is_named(encoder, call, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        call(encoder)


ASKED, TOLD = "Find svaret på indlægget:", "Et svar:"
INSTRUCTED = [
    (Instructions(), None, None),
    (Instructions((ASKED,), ("",)), ASKED, None),
    (Instructions((ASKED,), (TOLD,)), ASKED, TOLD),
]


@pytest.mark.parametrize("template", [TEMPLATE, Template()], ids=["template", "bare"])
@pytest.mark.parametrize(("known", "query", "document"), INSTRUCTED, ids=["none", "query", "both"])
def test_an_export_knows_the_instructions(base, sentences, tmp_path, template, known, query, document):
    """For l2v and for sentence-transformers, whose `encode` still has none."""
    from sentence_transformers import SentenceTransformer

    encoder = Encoder.from_pretrained(base, template=template, precision="fp32")
    encoder.instructions = known
    encoder.save(tmp_path / "out")
    texts = sentences[:6]
    expected = [encoder.encode(texts, instruction) for instruction in (query, document, None)]
    assert query is None or np.abs(expected[0] - expected[2]).max() > 1e-3
    for model in (encoder, Encoder.from_pretrained(tmp_path / "out")):
        assert model.instructions == known
        found = model.encode_query(texts), model.encode_document(texts), model.encode(texts)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_allclose(model.encode_query(texts, "", batch_size=2), expected[2], atol=1e-6)
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    found = theirs.encode_query(texts), theirs.encode_document(texts), theirs.encode(texts)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_instructions_that_are_not_one(encoder, monkeypatch):
    several = Instructions(("Find svaret:", "", "Find emnet:"), ("",), ())
    monkeypatch.setattr(encoder, "instructions", several)
    says = (
        "it was trained with 3 query instructions: 'Find svaret:', '', 'Find emnet:'; choose one with instruction=..."
    )
    with pytest.raises(UserError, match=re.escape(says)):
        encoder.encode_query("hund")
    np.testing.assert_array_equal(encoder.encode_query("hund", "Find emnet:"), encoder.encode("hund", "Find emnet:"))
    np.testing.assert_array_equal(encoder.encode_document("hund"), encoder.encode("hund"))
    monkeypatch.setattr(encoder, "instructions", Instructions(by_row=("document",)))
    with pytest.raises(
        UserError, match="the rows that it was trained on have their own document instructions; choose one"
    ):
        encoder.encode_document("hund")


def test_the_instructions_of_a_recipe(tiny_recipe, tmp_path):
    from l2v.recipe.load import load_recipe

    def found(*sources, stage="supervised", **changes):
        rows = [{"path": "x.jsonl"} | source for source in sources]
        file = tiny_recipe(tmp_path, **{"stages.supervised.data": rows} | changes)
        return Instructions.trained(load_recipe(str(file)), stage)

    asked = "Find den tekst, der besvarer spørgsmålet:"
    assert found({}) == Instructions(("",), ("",))
    assert found({"task": "question-da"}, {"task": "question-da", "weight": 2}) == Instructions((asked,), ("",))
    same = found({"task": "same-topic-da"}, {"document_prompt": "D:"})
    assert same.query == ("Find en tekst om det samme emne:", "") and same.document == (same.query[0], "D:")
    rows = {"task": "same-topic-da", "instruction": "spørg"}
    assert found(rows).by_row == ("document", "query") and found({"document_instruction": "d"}).by_row == ("document",)
    later = {"stages.simcse.from": "supervised"}
    assert found({"task": "question-da"}, stage="simcse", **later) == Instructions((asked,), ("",))
    assert (
        found({"task": "question-da"}, stage="mntp") == found({"task": "question-da"}, stage="simcse") == Instructions()
    )


@pytest.mark.parametrize("template", [TEMPLATE, Template()], ids=["template", "bare"])
def test_sentence_transformers_loads_the_export(base, sentences, tmp_path, template):
    from sentence_transformers import SentenceTransformer

    encoder = Encoder.from_pretrained(base, template=template, precision="fp32", length=24)
    encoder.save(tmp_path / "export")
    texts = [*sentences[:20], " ".join(sentences[:8])]  # the last one is longer than 24 tokens and is cut
    expected = encoder.encode(texts)
    theirs = SentenceTransformer(str(tmp_path / "export"), device="cpu").encode(texts)
    np.testing.assert_allclose(theirs, expected, atol=1e-5)
    np.testing.assert_allclose(Encoder.from_pretrained(tmp_path / "export").encode(texts), expected, atol=1e-6)


def test_plain_automodel_is_bidirectional_without_remote_code(encoder, tmp_path):
    from transformers import AutoModel

    encoder.save(tmp_path / "export")
    assert not list((tmp_path / "export").glob("*.py"))
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["is_causal"] is False and "auto_map" not in config
    plain = AutoModel.from_pretrained(tmp_path / "export").eval()
    ids = torch.arange(5, 17)[None]
    other = ids.clone()
    other[0, -1] = 60
    with torch.no_grad():
        assert not torch.equal(plain(input_ids=ids)[0][0, 0], plain(input_ids=other)[0][0, 0])


def test_an_export_replaces_only_an_export(encoder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty and not an export"):
        encoder.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    encoder.save(tmp_path / "out")
    encoder.save(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out"]


def test_published_adapters_load_and_order_does_not_matter(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    base = tmp_path / "base"
    shutil.copytree(GOLDEN / "base", base)
    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))  # the golden base has few rows
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(base)
    adapters = [str(GOLDEN / "mntp_adapter"), str(GOLDEN / "contrastive_adapter")]
    weights = []
    for order in (adapters, adapters[::-1], adapters[:1]):
        encoder = Encoder.from_pretrained(base, order, precision="fp32")
        weights.append(encoder.model.decoder.layers[0].mlp.up_proj.weight)
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=0)
    assert (weights[0] - weights[2]).abs().max() > 1e-3


def test_merging_rounds_once(base):
    """bf16 weights after the merge are the float32 sum rounded, not a sum of roundings."""
    from peft import LoraConfig, get_peft_model

    from l2v.model.load import inner_model, load_model
    from l2v.model.lora import merge_adapters
    from l2v.recipe import Base

    folders = []
    for at in range(3):
        torch.manual_seed(at)
        peft = get_peft_model(
            inner_model(load_model(Base(model=str(base)), head=False, dtype=torch.float32)),
            LoraConfig(r=4, lora_alpha=8, target_modules=["up_proj"], init_lora_weights=False),
        )
        folders.append(str(base.parent / f"adapter{at}"))
        peft.save_pretrained(folders[-1])
    exact = inner_model(load_model(Base(model=str(base)), head=False, dtype=torch.bfloat16)).float()
    exact = merge_adapters(exact, folders).layers[0].mlp.up_proj.weight
    ours = inner_model(load_model(Base(model=str(base)), head=False, dtype=torch.bfloat16))
    ours = merge_adapters(ours, folders).layers[0].mlp.up_proj.weight
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, exact.bfloat16())


def narrow(folder: Path) -> str:
    """An adapter with the right names for a base of another width."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(GOLDEN / "mntp_adapter", folder / "narrow")
    file = folder / "narrow" / "adapter_model.safetensors"
    save_file({k: v[..., :5].contiguous() if "lora_A" in k else v for k, v in load_file(file).items()}, file)
    return str(folder / "narrow")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda base, tmp: Encoder.from_pretrained(base).encode(["fint", "  "]), "text 1 is empty"),
        (lambda base, tmp: Encoder.from_pretrained(tmp), "neither a model, an adapter nor a run"),
        (lambda base, tmp: Encoder.from_pretrained("no/such-model"), "was not found"),
        (lambda base, tmp: Encoder.from_pretrained(base, [str(tmp)]), "no adapter_config.json"),
        (lambda base, tmp: Encoder.from_pretrained(base, [narrow(tmp)]), "does not fit this base"),
    ],
    ids=["empty text", "empty folder", "no such base", "no adapter", "adapter of another base"],
)
def test_mistakes_get_a_sentence(base, tmp_path, make, sentence):
    with pytest.raises(UserError, match=sentence):
        make(base, tmp_path)


def test_an_adapter_with_strange_keys_is_refused(base, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(GOLDEN / "mntp_adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({k.replace("layers.0", "blocks.0"): v for k, v in load_file(file).items()}, file)
    with pytest.raises(UserError, match="belong to no module of this base"):
        Encoder.from_pretrained(base, [str(tmp_path / "adapter")])


@pytest.mark.parametrize("named", ["sdpa", "eager", "flash_attention_2"])
def test_an_attention_that_a_base_names_mixes_no_texts(base, tmp_path, named):
    """transformers lets this key of a file win over its argument, and other attentions ignore the borders of packed texts."""
    own = Path(shutil.copytree(base, tmp_path / "own"))
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps(config | {"_attn_implementation": named}))
    texts = ["En hund løber.", "Vejret er godt i dag, siger de.", "Ja."]
    encoder = Encoder.from_pretrained(own)
    together = encoder.encode(texts)
    assert np.abs(together - np.stack([encoder.encode(text) for text in texts])).max() < 1e-6
    assert np.abs(together - Encoder.from_pretrained(base).encode(texts)).max() < 1e-6


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"attention": "Causal"}, "attention is 'Causal'; choose one of bidirectional, causal"),
        ({"precision": "float32"}, "precision is 'float32'; choose one of auto, bf16, fp32"),
        ({"pooling": "cls"}, "pooling is 'cls'; choose one of mean, weighted_mean, last, first"),
        ({"backend": "eager"}, "backend is 'eager'; choose one of l2v, sdpa, flash_attention_2"),
    ],
)
def test_a_misspelled_option_is_refused(base, option, says):
    with pytest.raises(UserError, match=says):
        Encoder.from_pretrained(base, **option)
    with pytest.raises(UserError, match=says):
        Encoder.identity(base, **option)


def test_exports_of_two_stages_have_two_identities(base, tmp_path):
    """Files of one name and size whose first MiB is the same embedding: only a weight of the last layer differs."""
    import torch
    from transformers import AutoModelForCausalLM

    found = []
    for change in (0.0, 0.5):
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(20_000)  # 2.5 MiB at the start of the file
        with torch.no_grad():
            model.model.embed_tokens.weight.fill_(0.25)
            model.model.layers[-1].mlp.down_proj.weight += change
        model.save_pretrained(tmp_path / str(change))
        found.append(Encoder.identity(tmp_path / str(change)))
    assert found[0].pop("sha256") != found[1].pop("sha256")
    assert found[0] | {"base": ""} == found[1] | {"base": ""}
