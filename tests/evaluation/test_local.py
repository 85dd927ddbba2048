"""Benchmarks from files: every type against a computation of our own, file names and manifests, bad rows and bad input."""

import gzip
import json

import numpy as np
import pytest
import yaml
from scipy.stats import spearmanr
from sklearn.cluster import MiniBatchKMeans
from sklearn.metrics import f1_score, ndcg_score, v_measure_score

from l2v import Encoder
from l2v.data import sample
from l2v.errors import RecipeError, UserError
from l2v.evaluation.baselines import Tfidf
from l2v.evaluation.local import local_benchmark
from l2v.evaluation.model import EncoderSpec, MtebEncoder
from l2v.evaluation.prompts import Prompts
from l2v.evaluation.retrieval import tfidf_scores
from l2v.evaluation.run import run_model
from l2v.evaluation.select import select


@pytest.fixture(scope="module")
def folder(tmp_path_factory, sentences, write_jsonl):
    """Every type under a name that tells it; the pairs with groups of two, gzipped."""
    path = tmp_path_factory.mktemp("set") / "mini"
    path.mkdir()
    pairs = [
        {"query": f"Hvem {t.split(' ', 1)[1]}", "positive": t, "group": i // 2} for i, t in enumerate(sentences[:60])
    ]
    with gzip.open(path / "pairs.dev.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs)
    write_jsonl(path / "bitext.jsonl", [{"da": t, "en": t.replace("en", "ena")} for t in sentences[:40]])
    write_jsonl(path / "classification.jsonl", [{"text": t, "label": t.split()[0]} for t in sentences])
    write_jsonl(path / "clustering.jsonl", [{"text": t, "label": t.split()[0]} for t in sentences[:90]])
    rng = np.random.default_rng(0)
    sts = [
        {"a": a, "b": b, "score": float(rng.integers(1, 6))}
        for a, b in zip(sentences[:50], sentences[3:53], strict=True)
    ]
    write_jsonl(path / "sts.jsonl", sts)
    return path


@pytest.fixture(scope="module")
def encoder(tiny_base):
    return Encoder.from_pretrained(tiny_base, precision="fp32")


def score(model, folder, out):
    row = run_model(model, local_benchmark(folder).tasks, out, log=lambda _: None)
    assert not row.failed, row.failed
    return {name.removeprefix("mini-"): found.score for name, found in row.scores.items()}


def relevance(sentences):
    truth = np.kron(np.eye(30), np.ones((2, 2)))
    queries = [f"Hvem {t.split(' ', 1)[1]}" for t in sentences[:60]]
    merged = list(dict.fromkeys(queries))  # the same question of several rows is one query
    rows = np.zeros((len(merged), 60))
    for i, query in enumerate(queries):
        rows[merged.index(query)] = np.maximum(rows[merged.index(query)], truth[i])
    return merged, rows


def test_every_type_equals_our_own(folder, tiny_base, encoder, sentences, tmp_path):
    model = MtebEncoder(EncoderSpec(str(tiny_base), (), {"precision": "fp32"}), "tiny")
    found = score(model, folder, tmp_path)
    queries, truth = relevance(sentences)
    scores_NM = (
        encoder.encode(queries) @ encoder.encode(sentences[:60]).T
    )  # local tasks have no prompt unless they name one
    assert found["pairs.dev"] == pytest.approx(ndcg_score(truth, scores_NM, k=10), abs=2e-5)

    first, second = sentences[:40], [t.replace("en", "ena") for t in sentences[:40]]
    nearest = (encoder.encode(first) @ encoder.encode(second).T).argmax(1)
    expected = f1_score(np.arange(40), nearest, average="weighted", zero_division=0)
    assert found["bitext"] == pytest.approx(expected, abs=1e-6)

    with open(folder / "sts.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    cosines = (encoder.encode([r["a"] for r in rows]) * encoder.encode([r["b"] for r in rows])).sum(1)
    assert found["sts"] == pytest.approx(spearmanr([r["score"] for r in rows], cosines)[0], abs=1e-4)

    import random

    texts_NE = encoder.encode(sentences[:90], normalize=False)
    labels = np.array([t.split()[0] for t in sentences[:90]])
    generator, measures = random.Random(42), []
    for _ in range(10):
        chosen = generator.choices(range(90), k=90)
        kmeans = MiniBatchKMeans(len(set(labels)), batch_size=512, init="k-means++", n_init=1, random_state=42)
        measures.append(v_measure_score(labels[chosen], kmeans.fit_predict(texts_NE[chosen])))
    assert found["clustering"] == pytest.approx(np.mean(measures), abs=1e-6)
    assert found["classification"] > 0.5  # the first word is the label; test_seb_tasks compares classification exactly


def test_tfidf_is_the_tfidf_of_the_quickstart(folder, sentences, tmp_path):
    found = score(Tfidf(), folder, tmp_path)  # every type takes sparse vectors
    queries, truth = relevance(sentences)
    assert found["pairs.dev"] == pytest.approx(ndcg_score(truth, tfidf_scores(queries, sentences[:60]), k=10), abs=2e-5)
    assert set(found) == {"pairs.dev", "bitext", "classification", "clustering", "sts"}


def test_group_mates_can_be_excluded_or_ignored(sentences, write_jsonl, tmp_path):
    # each question is the text of the answer's group-mate: found first unless it is left out
    rows = [{"query": sentences[i ^ 1], "positive": sentences[i], "group": i // 2} for i in range(60)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    scores = tfidf_scores([row["query"] for row in rows], sentences[:60])
    mates = np.arange(60) ^ 1
    wanted = {"ignore": ndcg_score(np.eye(60), scores, k=10)}
    scores[np.arange(60), mates] = -1
    wanted["exclude"] = ndcg_score(np.eye(60), scores, k=10)
    wanted["relevant"] = None
    for groups, expected in wanted.items():
        task = {"type": "retrieval", "name": groups, "file": "pairs.jsonl", "groups": groups}
        (tmp_path / "eval.yaml").write_text(yaml.safe_dump({"name": "mates", "tasks": [task]}))
        row = run_model(Tfidf(), local_benchmark(tmp_path).tasks, tmp_path / "out", log=lambda _: None)
        found = row.scores[f"mates-{groups}"].score
        assert (
            found > wanted["ignore"] + 0.1 if expected is None else found == pytest.approx(expected, abs=0.01)
        )  # ties
    assert wanted["exclude"] > wanted["ignore"] + 0.02


def test_the_sample_is_a_benchmark():
    chosen = select(["local:sample"])
    assert [task.metadata.type for task in chosen.tasks] == [
        "Retrieval", "BitextMining", "BitextMining", "Classification", "Clustering", "STS",
    ]  # fmt: skip
    assert chosen.local == ["sample"] and not chosen.failed and not chosen.notes
    split = chosen.tasks[0].dataset["default"]["test"]
    assert (len(split["corpus"]), len(split["queries"])) == (420, len(sample.questions("heldout")))


def test_bad_rows_are_left_out_counted_and_named(tmp_path):
    good = [json.dumps({"query": f"spørgsmål {i}", "positive": f"svar {i}"}).encode() for i in range(5)]
    bad = [
        b"{broken",
        '{"query": "æ", "positive": "x"}'.encode("latin-1"),
        b"[1]",
        b'{"query": "", "positive": "x"}',
        b'{"query": "x"}',
    ]
    (tmp_path / "pairs.jsonl").write_bytes(b"\n".join([good[0], *bad, *good[1:]]))
    (tmp_path / "sts.jsonl").write_bytes(b"nothing\n")
    found = local_benchmark(tmp_path)
    assert [len(t.dataset["default"]["test"]["queries"]) for t in found.tasks] == [6]
    name, file = tmp_path.name, tmp_path / "pairs.jsonl"
    (note,) = found.notes
    assert note.startswith(f"{name}-pairs: 4 rows skipped, the first at {file}, line 2: malformed JSON")
    assert note.endswith(f"; {file}: not valid UTF-8, read as Windows-1252 (1 line)")
    assert list(found.failed) == [f"{name}-sts"]
    assert f"{tmp_path / 'sts.jsonl'}, line 1: malformed JSON" in found.failed[f"{name}-sts"]


def test_a_changed_file_is_scored_again(tmp_path, write_jsonl, sentences):
    rows = [{"da": t, "en": t.upper()} for t in sentences[:20]]
    for number, expected in ((20, False), (20, True), (15, False)):
        write_jsonl(tmp_path / "bitext.jsonl", rows[:number])
        row = run_model(Tfidf(), local_benchmark(tmp_path).tasks, tmp_path / "out", log=lambda _: None)
        assert [found.cached for found in row.scores.values()] == [expected]


@pytest.mark.parametrize(
    ("tasks", "sentence"),
    [
        ([{"type": "search", "file": "a.jsonl"}], "task 1: needs a type: retrieval, bitext"),
        ([{"type": "sts"}], "task 1: needs a file"),
        (
            [{"type": "sts", "file": "sts.jsonl", "frist": "a"}],
            "task 1: a sts task has no 'frist'; it may have file, name",
        ),
        (
            [{"type": "retrieval", "file": "x", "groups": "drop"}],
            "groups is 'drop'; it must be relevant, exclude or ignore",
        ),
        ([{"type": "sts", "file": "sts.jsonl"}] * 2, "two tasks have the same name"),
        (
            [{"type": "sts", "file": "sts.jsonl", "languages": ["dansk"]}],
            "languages is ['dansk']; it must be like [dan-Latn]",
        ),
    ],
)
def test_a_wrong_manifest_is_one_sentence(tasks, sentence, folder):
    manifest = folder / "wrong.yaml"
    manifest.write_text(yaml.safe_dump({"tasks": tasks}))
    try:
        with pytest.raises(RecipeError) as error:
            local_benchmark(manifest)
    finally:
        manifest.unlink()
    assert sentence in str(error.value)


def test_what_is_not_there_is_one_sentence(tmp_path, folder):
    for source, text in [
        (tmp_path / "no", "no such folder"),
        (tmp_path, "has no eval.yaml and no file called"),
        (folder / "x.yaml", "no such"),
    ]:
        with pytest.raises(UserError, match=text):
            local_benchmark(source)
    with pytest.raises(RecipeError, match="did you mean DKHateClassification"):
        select(["DKHateClasification"])


def test_prompts_by_task_and_side(tmp_path):
    query, other = local_benchmark_metadata("Retrieval"), local_benchmark_metadata("Classification")
    assert Prompts("off").instruction(query, "query") is None
    assert Prompts("mteb").instruction(query, "query") == "find"
    assert Prompts("mteb").instruction(query, "document") is None
    assert Prompts("mteb").instruction(other, None) == "find"
    file = tmp_path / "prompts.yaml"
    file.write_text("Retrieval: {query: spørg, document: svar}\nClassification: ''\n")
    assert [Prompts(str(file)).instruction(query, side) for side in ("query", "document")] == ["spørg", "svar"]
    assert Prompts(str(file)).instruction(other, None) is None
    file.write_text("Retrieval: [1]\n")
    with pytest.raises(UserError, match="Retrieval must be a text"):
        Prompts(str(file))
    with pytest.raises(UserError, match="use en, da, mteb, off, trained, or a YAML file"):
        Prompts("dk")


def local_benchmark_metadata(kind):
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(
        name="x", description="x", type=kind, main_score="x", eval_langs=["dan-Latn"], prompt="find",
        dataset={"path": "x", "revision": "x"},
    )  # fmt: skip


def test_scores_and_several_answers_of_own_pairs(tmp_path, write_jsonl):
    rows = [
        {"query": "Hvad er en hund?", "positive": "Et dyr.", "label": 1},
        {"query": "Hvad er en hund?", "positive": "En bil.", "label": 0},
        {"query": "Hvad er en ko?", "positive": ["Et kreatur.", "Noget, der giver mælk."]},
    ]  # fmt: skip
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    found = local_benchmark(tmp_path)
    split = found.tasks[0].dataset["default"]["test"]
    texts = dict(zip(split["corpus"]["id"], split["corpus"]["text"], strict=True))
    relevant = [sorted(texts[key] for key in of) for of in split["relevant_docs"].values()]
    assert relevant == [["Et dyr."], ["Et kreatur.", "Noget, der giver mælk."]] and "En bil." in texts.values()
    assert any("1 rows are no answer by their 'label' of 0" in note for note in found.notes)


def test_own_questions_are_known_by_their_columns(tmp_path):
    (tmp_path / "kunder.csv").write_text("Spørgsmål;Svar\nHvad?;Det her.\nHvem?;Os alle.\n", encoding="utf-8")
    found = local_benchmark(tmp_path / "kunder.csv")
    assert [task.metadata.type for task in found.tasks] == ["Retrieval"]
    (tmp_path / "andet.csv").write_text("a;b\n1;2\n", encoding="utf-8")
    with pytest.raises(UserError, match="it has no columns of question and answer, and its name does not begin with"):
        local_benchmark(tmp_path / "andet.csv")
