"""The twelve Danish tasks through mteb, offline, on small data of the same schema; scores against computations of our own."""

from collections import defaultdict

import datasets
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, ndcg_score

from l2v import Encoder
from l2v.evaluation import report
from l2v.evaluation.model import EncoderSpec, MtebEncoder
from l2v.evaluation.prompts import Prompts
from l2v.evaluation.run import run_model
from l2v.evaluation.seb import BY_NAME, SEB_DA
from l2v.evaluation.select import seb_da, select

NAMES = [task.name for task in SEB_DA]
TRAIN, LABELS = 120, 3
EXPERIMENTS = 3  # of mteb's ten: classifiers take the time


@pytest.fixture(scope="module")
def texts(sentences):
    """A hundred and sixty-five texts of different length."""
    return [f"{t} {sentences[-i]}" if i % 5 == 0 else t for i, t in enumerate(sentences[:165])]


def labelled(texts, shift):
    return datasets.Dataset.from_dict(
        {"text": texts, "label": [(i * 7 + shift + len(t)) % LABELS for i, t in enumerate(texts)]}
    )


def fill(task, texts):
    """Give a task small data as its loader would leave it."""
    name, cell = task.metadata.name, BY_NAME[task.metadata.name]
    if cell.type == "Classification":
        task.n_experiments = EXPERIMENTS
        parts = {"train": labelled(texts[:TRAIN], 0)}
        if cell.split != "train":
            parts[cell.split] = labelled(texts[TRAIN:], 1)
        whole = datasets.DatasetDict(parts)
        task.dataset = whole if cell.subset == "default" else {cell.subset: whole}
    elif cell.type == "BitextMining":
        columns = {"sentence1": texts[:40], "sentence2": [t.replace("en", "ena") for t in texts[:40]]}
        task.dataset = datasets.DatasetDict(test=datasets.Dataset.from_dict(columns))
    elif name == "DanFeverRetrieval":  # its own transform makes the retrieval set
        features = datasets.Features(
            claim=datasets.Value("string"),
            evidence_extract=datasets.Value("string"),
            label=datasets.ClassLabel(names=["Refuted", "Supported", "NotEnoughInfo"]),
        )
        columns = {"claim": texts[:60], "evidence_extract": texts[60:120], "label": [i % 3 for i in range(60)]}
        task.dataset = datasets.DatasetDict(train=datasets.Dataset.from_dict(columns, features=features))
        task.dataset_transform()
    elif name == "TV2Nordretrieval":
        task.queries = {"test": {f"q{i}": text for i, text in enumerate(texts[:40])}}
        task.corpus = {"test": {f"d{i}": {"title": "", "text": text} for i, text in enumerate(texts[60:100])}}
        task.relevant_docs = {"test": {f"q{i}": {f"d{i}": 1} for i in range(40)}}
    else:
        corpus = {"id": [f"d{i}" for i in range(60)], "title": [""] * 60, "text": texts[90:150]}
        task.dataset = {
            "default": {
                "train": {
                    "corpus": datasets.Dataset.from_dict(corpus),
                    "queries": datasets.Dataset.from_dict({"id": [f"q{i}" for i in range(20)], "text": texts[:20]}),
                    "relevant_docs": {f"q{i}": {f"d{3 * i + j}": 1 for j in range(3)} for i in range(20)},
                    "top_ranked": None,
                }
            }
        }
    task.data_loaded = True
    return task


@pytest.fixture(scope="module")
def ran(tiny_base, texts, tmp_path_factory):
    """One run over all twelve: the row, the model, the filled tasks."""
    folder = tmp_path_factory.mktemp("eval")
    model = MtebEncoder(EncoderSpec(str(tiny_base), (), {"precision": "fp32"}), "tiny", prompts=Prompts("da"))
    said: list[str] = []
    row = run_model(model, [fill(task, texts) for task in seb_da()], folder, log=said.append)
    return row, said, folder


@pytest.fixture(scope="module")
def encoder(tiny_base):
    return Encoder.from_pretrained(tiny_base, precision="fp32")


def test_every_name_resolves_to_the_task_that_seb_scores():
    tasks = seb_da()
    assert [task.metadata.name for task in tasks] == NAMES and len(set(NAMES)) == 12
    for task, cell in zip(tasks, SEB_DA, strict=True):
        assert (task.metadata.type, task.metadata.main_score) == (cell.type, cell.metric)
        assert (task.hf_subsets, list(task.eval_splits)) == ([cell.subset], [cell.split])
    danish = [t.metadata.name for t in select(["scandinavian"]).tasks if "dan" in t.metadata.languages]
    assert sorted(danish) == sorted(NAMES)
    assert len(select(["scandinavian", "seb-da"]).tasks) == 28


def test_all_twelve_ran(ran):
    row, said, _ = ran
    assert not row.failed and list(row.scores) == NAMES, said


# One of each kind: tested on its training part, a language and split of its own, more samples for each label.
OFTEN = ("DanishPoliticalCommentsClassification", "MassiveIntentClassification", "ScalaClassification")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(task.name, marks=() if task.name in OFTEN else pytest.mark.slow)
        for task in SEB_DA
        if task.type == "Classification"
    ],
)
def test_classification_equals_our_own(name, ran, encoder, texts):
    cell, task = BY_NAME[name], next(task for task in seb_da() if task.metadata.name == name)
    train = labelled(texts[:TRAIN], 0)
    test = train if cell.split == "train" else labelled(texts[TRAIN:], 1)
    told = Prompts("da").table[name]
    train_NE, test_NE = (encoder.encode(part["text"], instruction=told, normalize=False) for part in (train, test))
    order, accuracies = list(range(TRAIN)), []
    for _ in range(EXPERIMENTS):  # each experiment shuffles the order of the one before
        np.random.RandomState(42).shuffle(order)
        taken = defaultdict(list)
        for i in order:
            if len(taken[train["label"][i]]) < task.samples_per_label:
                taken[train["label"][i]].append(i)
        chosen = [i for i in order if i in set().union(*taken.values())]
        model = LogisticRegression(max_iter=100, random_state=42)
        model.fit(train_NE[chosen], [train["label"][i] for i in chosen])
        accuracies.append(accuracy_score(test["label"], model.predict(test_NE)))
    assert ran[0].scores[name].score == pytest.approx(np.mean(accuracies), abs=1e-6)


def test_bitext_equals_our_own(ran, encoder, texts):
    told = Prompts("da").table["BornholmBitextMining"]
    first, second = texts[:40], [t.replace("en", "ena") for t in texts[:40]]
    found = (encoder.encode(first, instruction=told) @ encoder.encode(second, instruction=told).T).argmax(1)
    expected = f1_score(np.arange(40), found, average="weighted", zero_division=0)
    assert ran[0].scores["BornholmBitextMining"].score == pytest.approx(expected, abs=1e-6)
    assert 0.05 < expected < 1


@pytest.mark.parametrize(
    ("name", "queries", "documents"),
    [
        ("DanFeverRetrieval", 60, (60, 120)),
        ("TV2Nordretrieval", 40, (60, 100)),
        ("TwitterHjerneRetrieval", 20, (90, 150)),
    ],
)
def test_retrieval_equals_our_own(name, queries, documents, ran, encoder, texts):
    asked, corpus = texts[:queries], list(dict.fromkeys(texts[slice(*documents)]))
    truth = np.zeros((len(asked), len(corpus)))
    for i in range(queries):
        if name == "TwitterHjerneRetrieval":
            truth[i, 3 * i : 3 * i + 3] = 1
        elif name == "TV2Nordretrieval":
            truth[i, i] = 1
        elif i % 3 == 1:  # Supported
            truth[i, corpus.index(texts[60 + i])] = 1
    queries_NE = encoder.encode(asked, instruction=Prompts("da").table[name])
    scores_NM = queries_NE @ encoder.encode(corpus).T  # documents carry no instruction
    expected = ndcg_score(truth, scores_NM, k=10)
    assert ran[0].scores[name].score == pytest.approx(expected, abs=2e-5)  # mteb rounds to five digits


def test_means_are_of_the_cells(ran):
    row = ran[0]
    found = report.means(row, NAMES)
    scores = {name: score.score for name, score in row.scores.items()}
    expected = pytest.approx(np.mean(list(scores.values())))
    assert (found["seb_da"], found["task"]) == (expected, expected)
    types = defaultdict(list)
    for task in SEB_DA:
        types[task.type].append(scores[task.name])
    assert found["task_type"] == pytest.approx(np.mean([np.mean(group) for group in types.values()]))
    del row.scores["ScalaClassification"]
    try:
        assert set(report.means(row, NAMES).values()) == {None}
    finally:
        row.scores["ScalaClassification"] = type(next(iter(row.scores.values())))(
            scores["ScalaClassification"], {}, "accuracy", "Classification", "", 0.0, False
        )


def test_a_result_that_is_kept_is_not_computed_again(ran, tiny_base, texts, monkeypatch):
    row, _, folder = ran
    spec = EncoderSpec(str(tiny_base), (), {"precision": "fp32"})
    monkeypatch.setattr(EncoderSpec, "load", lambda self: pytest.fail("loaded a model for results that are there"))
    names = ["LccSentimentClassification", "TwitterHjerneRetrieval"]
    tasks = [fill(task, texts) for task in seb_da() if task.metadata.name in names]
    again = run_model(MtebEncoder(spec, "tiny", prompts=Prompts("da")), tasks, folder, log=lambda _: None)
    assert all(score.cached for score in again.scores.values()) and set(again.scores) == set(names)
    assert {n: s.score for n, s in again.scores.items()} == {n: row.scores[n].score for n in names}
    other = MtebEncoder(spec, "tiny", prompts=Prompts("en"))  # other prompts, other results
    assert other.mteb_model_meta.revision != MtebEncoder(spec, "tiny", prompts=Prompts("da")).mteb_model_meta.revision


def test_a_task_without_network_costs_one_sentence_and_the_rest_goes_on(tiny_base, texts, tmp_path):
    tasks = [task for task in seb_da() if task.metadata.name in ("DKHateClassification", "TwitterHjerneRetrieval")]
    fill(tasks[1], texts)
    model = MtebEncoder(EncoderSpec(str(tiny_base), (), {"precision": "fp32"}), "tiny")
    said = []
    row = run_model(model, tasks, tmp_path, log=said.append)
    assert list(row.scores) == ["TwitterHjerneRetrieval"]
    assert row.failed == {
        "DKHateClassification": "DKHateClassification: its data is not on this machine and the hub cannot be reached; skipped"
    }
    assert said[0] == "[1/2] " + row.failed["DKHateClassification"]
