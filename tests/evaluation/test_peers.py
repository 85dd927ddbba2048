"""Rows that are not ours: published models with all they were published with, endpoints; and one place for instructions."""

import json

import numpy as np
import pytest
import torch
from mteb import get_task
from mteb.models.instruct_wrapper import InstructSentenceTransformerModel
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from support.served import Served

from l2v.commands.main import main
from l2v.errors import UserError
from l2v.evaluation.baselines import baseline
from l2v.evaluation.endpoint import EndpointBaseline
from l2v.evaluation.model import EncoderSpec, MtebEncoder, model_meta
from l2v.evaluation.prompts import TABLES, Prompts
from l2v.evaluation.seb import SEB_DA
from l2v.recipe.instructions import Instructions
from l2v.recipe.tasks import EVALUATED, TASKS

TWITTER, TWEETS = (get_task(name).metadata for name in ("TwitterHjerneRetrieval", "AngryTweetsClassification"))


def test_training_and_evaluation_share_their_words():
    names = {task.name for task in SEB_DA}
    assert set(TABLES["da"]) == set(TABLES["en"]) == names and set(EVALUATED) <= names
    for task, kind in EVALUATED.items():
        assert TABLES["da"][task] == TASKS[kind].query
        both = get_task(task).metadata.type not in ("Retrieval", "Reranking")
        assert TASKS[kind].symmetric == both, task  # a search has an instruction on one side
    assert Prompts("da").instruction(TWITTER, "query") == TASKS["question-da"].query
    assert Prompts("da").instruction(TWITTER, "document") is None


@pytest.mark.parametrize(
    ("trained", "metadata", "side", "expected"),
    [
        (Instructions(), TWITTER, "query", None),
        (Instructions(("Find:",), ("",)), TWITTER, "query", "Find:"),
        (Instructions(("Find:",), ("Tekst:",)), TWITTER, "document", "Tekst:"),
        (Instructions(("Find:",), ("",)), TWITTER, "document", None),
        (Instructions(("Find:",), ("",)), TWEETS, None, None),
        (Instructions(("a", TASKS["question-da"].query), ("",)), TWITTER, "query", TASKS["question-da"].query),
        (Instructions(("a", TASKS["same-sentiment-da"].query), ("",)), TWEETS, None, TASKS["same-sentiment-da"].query),
    ],
)
def test_only_what_the_encoder_was_trained_with(trained, metadata, side, expected):
    assert Prompts("trained").instruction(metadata, side, trained) == expected


def test_several_trained_instructions_are_refused():
    with pytest.raises(UserError, match="trained with 2 query instructions"):
        Prompts("trained").instruction(TWITTER, "query", Instructions(("a", "b"), ("",)))


def loader(texts):
    """Texts as mteb hands them over."""
    import datasets

    return torch.utils.data.DataLoader(datasets.Dataset.from_dict({"text": list(texts)}), batch_size=3)


def encoded(model, texts, metadata, side):
    return np.asarray(
        model.encode(loader(texts), task_metadata=metadata, hf_split="test", hf_subset="da", prompt_type=side)
    )


@pytest.fixture(scope="module")
def exported(tiny_base, tmp_path_factory):
    """A folder of sentence-transformers."""
    from l2v import Encoder

    folder = tmp_path_factory.mktemp("exported") / "tiny"
    Encoder.from_pretrained(tiny_base).save(folder)
    return folder


def published(monkeypatch, loader, **options):
    meta = model_meta("test/published", {}).model_copy(update={"loader": loader, "loader_kwargs": options})
    monkeypatch.setitem(MODEL_REGISTRY, "test/published", meta)


def test_a_template_of_mtebs_metadata(exported, sentences, monkeypatch):
    from sentence_transformers import SentenceTransformer

    published(
        monkeypatch, InstructSentenceTransformerModel, instruction_template="Instruct: {instruction}\nQuery: ",
        apply_instruction_to_passages=False,
    )  # fmt: skip
    model, plain = baseline(f"test/published={exported}"), SentenceTransformer(str(exported))
    task = TWITTER.prompt if isinstance(TWITTER.prompt, str) else TWITTER.prompt["query"]
    expected = plain.encode(sentences[:5], prompt=f"Instruct: {task}\nQuery: ")
    np.testing.assert_allclose(encoded(model, sentences[:5], TWITTER, PromptType.query), expected, atol=1e-5)
    found = encoded(model, sentences[:5], TWITTER, PromptType.document)
    np.testing.assert_allclose(found, plain.encode(sentences[:5]), atol=1e-5)
    assert np.abs(found - expected).max() > 1e-3
    assert model.identity["template"] == "Instruct: {instruction}\nQuery: " and model.identity["pooling"] == "mean"
    other = baseline(str(exported))
    assert other.identity["template"] is None
    assert other.mteb_model_meta.revision != model.mteb_model_meta.revision


def test_prompts_of_mtebs_metadata(exported, sentences, monkeypatch):
    from sentence_transformers import SentenceTransformer

    published(
        monkeypatch, SentenceTransformerEncoderWrapper, model_prompts={"query": "query: ", "document": "passage: "}
    )
    model, plain = baseline(f"test/published={exported}"), SentenceTransformer(str(exported))
    for side, prompt in ((PromptType.query, "query: "), (PromptType.document, "passage: ")):
        found = encoded(model, sentences[:5], TWITTER, side)
        np.testing.assert_allclose(found, plain.encode(sentences[:5], prompt=prompt), atol=1e-5)


def test_code_of_mtebs_own_is_refused(monkeypatch):
    published(monkeypatch, MtebEncoder)
    with pytest.raises(UserError, match=r"with code of its own \(MtebEncoder\)"):
        baseline("test/published")


def test_eos_that_the_tokenizer_drops_is_put_back(exported, tmp_path, sentences):
    """tokenizer_config.json asks for EOS, tokenizer.json does not add it; the model pools the last token."""
    import shutil

    from sentence_transformers import SentenceTransformer

    folder = tmp_path / "last"
    shutil.copytree(exported, folder)
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    pooling = {key: value for key, value in pooling.items() if not key.startswith("pooling_mode")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling | {"pooling_mode": "lasttoken"}))
    before = baseline(str(folder))
    assert before.identity["eos"] == "none" and before.identity["pooling"] == "lasttoken"
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_eos_token": True}))
    model = baseline(str(folder))
    assert model.identity["eos"] == "restored"
    expected = SentenceTransformer(str(folder)).encode([f"{text}</s>" for text in sentences[:5]])
    found = encoded(model, sentences[:5], TWEETS, None)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - encoded(before, sentences[:5], TWEETS, None)).max() > 1e-3
    long = baseline(str(folder))
    long.model.max_seq_length = 20  # cut texts keep it
    ids = long.model.tokenizer(" ".join(sentences[:9]), truncation=True, max_length=20)["input_ids"]
    assert len(ids) == 20 and ids[-1] == long.model.tokenizer.eos_token_id


def test_an_endpoint_is_a_row(tiny_base, tmp_path, sentences, write_jsonl, capsys):
    write_jsonl(tmp_path / "pairs.jsonl", [{"query": t.rsplit(" ", 2)[0], "positive": t} for t in sentences[:40]])
    served = Served(tiny_base, tmp_path)
    try:
        row = f"{served.url}#tiny"
        command = ["eval", str(tiny_base), "--baselines", row, "--benchmark", f"local:{tmp_path / 'pairs.jsonl'}"]
        assert main([*command, "--prompts", "off", "--out", str(tmp_path / "out")]) == 0
        found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["rows"]
        scores = [[score["score"] for score in row["scores"].values()] for row in found]
        assert scores[0] == pytest.approx(scores[1], abs=1e-6) and found[0]["identity"]["endpoint"] == served.url
        ours = MtebEncoder(EncoderSpec(str(tiny_base)), "ours", prompts=Prompts("off"), normalize=True)
        model, texts = EndpointBaseline(row), [*sentences[:70], " ", sentences[70]]
        expected = ours.vectors(texts)
        np.testing.assert_allclose(encoded(model, texts, TWEETS, None), expected, atol=1e-5)
        assert model.empty == 1
        with pytest.raises(UserError, match=r"status 404: .*this server has 'tiny'"):
            EndpointBaseline(f"{served.url}#other")
        with pytest.raises(UserError, match="give URL#MODEL"):
            EndpointBaseline(served.url)
    finally:
        served.process.kill()
        served.process.join()
