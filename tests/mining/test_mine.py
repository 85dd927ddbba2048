"""`l2v data mine`: what is found, dropped and written; resuming after a kill; bad input."""

import functools
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from l2v import Encoder
from l2v.commands import main as cli
from l2v.data.sources import open_rows
from l2v.encoding.identity import encoder_key
from l2v.mining import mine as module
from l2v.mining import vectors as vectors_module
from l2v.mining.candidates import Bm25, Exact, Faiss
from l2v.mining.choose import Rule, choose, in_turn, plain
from l2v.mining.vectors import vectors
from l2v.recipe import Source

QUERY = "Hvem løber gennem skoven?"
ANSWER = "Hunden løber gennem skoven."
PLANTED = "Hunden løber gennem skoven nu."  # an answer that no label says is one


@pytest.fixture
def pairs(sentences) -> list[dict]:
    """40 questions; the second answer of the first question, an unlabelled answer, and a group of two."""
    rows = [
        {"query": f"Hvem {t[:-1].split(' ', 1)[1]}?", "positive": t, "doc": i} for i, t in enumerate(sentences[::6])
    ]
    rows[0] = {"query": QUERY, "positive": ANSWER, "doc": 100}
    rows.append({"query": QUERY.upper(), "positive": sentences[77], "doc": 101})
    rows.append({"query": "Hvad laver hunden?", "positive": PLANTED, "doc": 102})
    rows.append({"query": "Hvad laver dyret?", "positive": sentences[33], "doc": 100})
    return rows


@pytest.fixture
def mined(base, tmp_path, write_jsonl, pairs, capsys):
    """mined(*options, rows=pairs, expect=0) -> (rows written, what was told)."""

    def run(*options: object, rows=None, expect: int = 0, out: str = "out.jsonl"):
        data = write_jsonl(tmp_path / "pairs.jsonl", rows or pairs)
        code = cli.main(["data", "mine", str(base), data, "--out", str(tmp_path / out), *map(str, options)])
        told = capsys.readouterr()
        assert code == expect, told.err
        path = tmp_path / out
        written = [json.loads(x) for x in path.read_text().splitlines()] if path.suffix == ".jsonl" and not code else []
        return written, told.out if not code else told.err

    return run


@functools.cache
def load(base: Path) -> Encoder:
    return Encoder.from_pretrained(base)


def cosines(base: Path, query: str, texts: list[str]) -> np.ndarray:
    encoder = load(base)
    return encoder.encode(texts) @ encoder.encode(query)


def test_a_planted_false_negative_is_dropped(mined, base, tmp_path):
    """An answer without a label scores as the positive does; without the filter it would be the hardest negative."""
    query = cosines(base, QUERY, [ANSWER, PLANTED])
    assert query[1] > 0.95 * query[0] > 0
    kept = next(row for row in mined("--number", 7)[0] if row["query"] == QUERY)
    assert PLANTED not in kept["negatives"] and kept["negatives"]
    report = (tmp_path / "out.md").read_text()
    assert re.search(r"dropped: too close to the positive \| \d", report)
    (tmp_path / "out.jsonl").unlink()
    unfiltered = next(r for r in mined("--number", 7, "--relative", "none", "--depth", 60)[0] if r["query"] == QUERY)
    assert PLANTED in unfiltered["negatives"]


def test_every_row_equals_an_independent_computation(mined, base, pairs):
    """The rule, over all documents, in plain Python."""
    rows, _ = mined("--by", "encoder", "--depth", 60, "--number", 3, "--group", "doc")
    documents = list(dict.fromkeys(row["positive"] for row in pairs))
    counts = Counter()
    for row, given in zip(rows, pairs, strict=True):
        assert (row["query"], row["positive"]) == (given["query"], given["positive"])
        scores = dict(zip(documents, cosines(base, row["query"], documents), strict=True))
        limit = scores[row["positive"]] - 0.05 * abs(scores[row["positive"]])
        barred = {
            g["positive"] for g in pairs if g["query"].lower() == row["query"].lower() or g["doc"] == given["doc"]
        }
        allowed = sorted((d for d in documents if d not in barred and scores[d] <= limit), key=lambda d: -scores[d])
        assert row["negatives"] == allowed[:3]
        np.testing.assert_allclose(row["negative_scores"], [scores[d] for d in allowed[:3]], atol=2e-6)
        assert row["positive_score"] == pytest.approx(scores[row["positive"]], abs=2e-6)
        assert row["negative_from"] == ["encoder"] * len(row["negatives"])
        counts[len(row["negatives"])] += 1
    assert counts[3] > 10


def test_other_positives_of_the_query_and_of_its_group_are_no_negatives(mined, pairs, sentences, tmp_path):
    everything = ("--relative", "none", "--depth", 60, "--number", 7)
    rows, _ = mined(*everything, "--group", "doc")
    first, last = rows[0], rows[-1]
    assert sentences[77] not in first["negatives"] and ANSWER not in last["negatives"]
    assert first["group"] == last["group"] != rows[1]["group"]
    report = (tmp_path / "out.md").read_text()
    assert re.search(r"another positive \| [1-9]", report) and re.search(r"same group \| [1-9]", report)


def test_the_trainer_reads_what_was_mined(mined, tmp_path):
    rows, _ = mined("--task", "question-da", "--group", "doc")
    source = Source(
        str(tmp_path / "out.jsonl"),
        instruction="instruction",
        document_instruction="document_instruction",
        group="group",
    )
    read = open_rows([source], "pairs").to_list()
    assert [r["negatives"] for r in read] == [r["negatives"] for r in rows]
    assert {r["instruction"] for r in read} == {"Find den tekst, der besvarer spørgsmålet:"}
    mined("--task", "question-da", out="out.parquet")
    parquet = open_rows([Source(str(tmp_path / "out.parquet"))], "pairs")
    assert parquet["query"][:] == [r["query"] for r in rows] and not list(tmp_path.glob("out.parquet.*"))


def test_the_files_beside_the_rows(mined, tmp_path):
    rows, told = mined()
    assert f"{len(rows)} rows, {sum(len(r['negatives']) for r in rows)} negatives" in told
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "out.jsonl.work").exists()
    assert f"| positives | {len(rows)} |" in (tmp_path / "out.md").read_text()


def test_an_encoder_that_leaves_nothing_to_choose_from_is_told(mined, tmp_path):
    told = mined("--absolute", 1.9)[1]
    assert "rows without negatives" in told and "note: 100% of the rows got no negative" in told
    dropped = re.findall(r"^\| .* \| ([^|]+) \| [\d.-]+ \| [+-]\d", (tmp_path / "out.md").read_text(), flags=re.M)
    assert len(dropped) == len(set(dropped)) == 10, "each document once"
    (tmp_path / "out.jsonl").unlink()
    assert "note:" not in mined("--relative", "none")[1]


def test_a_corpus_gives_more_negatives(mined, tmp_path, write_jsonl, sentences):
    path = write_jsonl(tmp_path / "corpus.jsonl", [{"tekst": t} for t in sentences[1::6]])
    rows, _ = mined("--corpus", path, "--corpus-column", "tekst")
    assert {n for row in rows for n in row["negatives"]} & set(sentences[1::6])


def test_documents_of_another_instruction_are_not_met(mined):
    rows = [
        {"query": f"Hvad er {i}?", "positive": f"Det er tallet {i}.", "how": ("Svar:", "Tekst:")[i % 2]}
        for i in range(20)
    ]
    kept = mined("--document-instruction", "how", "--relative", "none", rows=rows)[0]
    for row, given in zip(kept, rows, strict=True):
        assert row["negatives"] and {int(n.split()[-1][:-1]) % 2 for n in row["negatives"]} == {rows.index(given) % 2}


# candidates


def test_exact_search_in_blocks_is_a_sort(monkeypatch):
    monkeypatch.setattr("l2v.mining.candidates.DOCUMENTS", 7)
    random = np.random.default_rng(0)
    documents, queries = (random.standard_normal((n, 8)).astype(np.float32) for n in (50, 9))
    at, scores = Exact(documents, torch.device("cpu")).search(queries, 12)
    whole = queries @ documents.T
    assert np.array_equal(at, np.argsort(-whole, axis=1)[:, :12])
    np.testing.assert_allclose(scores, -np.sort(-whole, axis=1)[:, :12], rtol=1e-5)
    kinds, own = np.arange(50) % 3, np.arange(9) % 3
    at, _ = Exact(documents, torch.device("cpu"), kinds).search(queries, 20, own)
    assert all(set(kinds[row[row >= 0]]) == {kind} for row, kind in zip(at, own, strict=True)) and (at < 0).any()


def test_faiss_finds_the_same(base, mined, tmp_path):
    pytest.importorskip("faiss")
    random = np.random.default_rng(1)
    documents, queries = (random.standard_normal((n, 8)).astype(np.float32) for n in (200, 9))
    exact = Exact(documents, torch.device("cpu")).search(queries, 12)
    for mine, theirs in zip(Faiss(documents, "Flat").search(queries, 12), exact, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    rows = mined()[0]
    (tmp_path / "out.jsonl").unlink()
    assert mined("--faiss", "Flat")[0] == rows


def test_bm25_equals_its_formula(sentences):
    """Robertson & Zaragoza's sum with Lucene's weights of words, over the same stems."""
    texts = [*sentences[:60], "Skoven, skoven og atter skoven.", "Hundens hunde"]
    words = Bm25(texts)
    stems = words.tokens(texts)
    assert stems[-1] == ["hund", "hund"] and stems[0] == ["hund", "løb", "gennem", "skov"]
    mean = sum(map(len, stems)) / len(stems)
    df = Counter(stem for text in stems for stem in set(text))
    queries = ["Hvor løber hundene?", "skove", "findes ikke"]
    at, scores = words.search(queries, len(texts))
    for i, query in enumerate(words.tokens(queries)):
        expected = {}
        for d, text in enumerate(stems):
            total = 0.0
            for stem in query:
                f, idf = text.count(stem), math.log(1 + (len(texts) - df[stem] + 0.5) / (df[stem] + 0.5))
                total += idf * f / (f + 1.5 * (0.25 + 0.75 * len(text) / mean))
            if total > 0:
                expected[d] = total
        found = {int(d): float(s) for d, s in zip(at[i], scores[i], strict=True) if d >= 0}
        assert found.keys() == expected.keys() and found == pytest.approx(expected, rel=1e-5)
        assert [round(s, 5) for s in found.values()] == sorted((round(s, 5) for s in found.values()), reverse=True)
    assert (at[2] == -1).all()


def test_the_rule():
    assert Rule(relative=0.95).ceiling(0.8) == pytest.approx(0.76)
    assert Rule(relative=0.95).ceiling(-0.2) == pytest.approx(-0.21), "never above a positive that scores below 0"
    assert Rule(relative=None, absolute=0.1).ceiling(0.8) == pytest.approx(0.7)
    assert Rule(relative=0.95, absolute=0.01).ceiling(0.8) == pytest.approx(0.76)
    assert Rule(relative=None).ceiling(0.8) == math.inf
    assert choose([7, 8, 9, 4], [0.9, 0.7, 0.77, 0.1], 0.8, Rule(number=1)) == ([1], [0, 2])
    assert in_turn([[3, 1, -1], [1, 2]]) == [3, 1, 2]
    assert plain("  Å\n b") == "å b"


def test_a_cross_encoder_judges(mined, base, tmp_path, tiny_config, pairs):
    """Its scores decide who is too close, and the order; the same as the library's own, pair by pair."""
    from sentence_transformers import CrossEncoder
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    folder = str(tmp_path / "cross")
    torch.manual_seed(1)
    config = LlamaConfig(**tiny_config, initializer_range=0.4, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    rows, _ = mined("--cross-encoder", folder, "--number", 5, rows=pairs[:20])
    judge, full = CrossEncoder(folder, device="cpu"), 0
    for row in rows:
        texts = (row["positive"], *row["negatives"])
        own, *scores = (float(judge.predict([(row["query"], text)], show_progress_bar=False)[0]) for text in texts)
        assert row["positive_score"] == pytest.approx(own, abs=1e-5)
        assert row["negative_scores"] == pytest.approx(scores, abs=1e-5)
        assert row["negative_scores"] == sorted(row["negative_scores"], reverse=True)
        assert all(score <= 0.95 * own + 1e-5 for score in scores)
        full += len(scores) == 5
    assert full


# resuming after a kill


def test_a_killed_run_goes_on_to_the_same_file(mined, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "BLOCK", 8)
    mined()
    whole = {name: (tmp_path / name).read_bytes() for name in ("out.jsonl", "out.md", "out.png")}
    for name in whole:
        (tmp_path / name).unlink()

    real, done = module._mine_one, []

    def dying(pairs, i, *rest):
        done.append(i)
        if i == 20:
            raise KeyboardInterrupt
        return real(pairs, i, *rest)

    monkeypatch.setattr(module, "_mine_one", dying)
    assert mined(expect=1)[1].splitlines()[-1] == "l2v: stopped"
    assert done == list(range(21)) and not (tmp_path / "out.jsonl").exists()
    done.clear()
    monkeypatch.setattr(module, "_mine_one", lambda pairs, i, *rest: done.append(i) or real(pairs, i, *rest))
    mined()
    assert done[0] == 16, "two shards of eight were finished"
    assert {name: (tmp_path / name).read_bytes() for name in whole} == whole


def test_other_options_find_no_shards_of_the_first(mined, monkeypatch, tmp_path):
    rows = mined("--number", 1)[0]
    work = tmp_path / "out.jsonl.work"
    (tmp_path / "out.jsonl").unlink()
    monkeypatch.setattr(module, "_finish", lambda *a: None)
    with pytest.raises(FileNotFoundError):
        mined("--number", 2)
    assert len(list(work.glob("*/shard-*.jsonl"))) == 1
    monkeypatch.undo()
    assert mined("--number", 1)[0] == rows and not work.exists()


def test_vectors_go_on_where_they_stopped(base, monkeypatch, tmp_path, sentences):
    monkeypatch.setattr(vectors_module, "BLOCK", 16)
    encoder = Encoder.from_pretrained(base)
    key, prompts = encoder_key(encoder), [None, "Find:"] * 30
    whole = np.array(vectors(encoder, key, sentences[:60], prompts, tmp_path / "a", "x"))
    real, calls = encoder.encode, []

    def dying(texts, *rest, **more):
        calls.append(len(texts))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(texts, *rest, **more)

    encoder.encode = dying
    with pytest.raises(KeyboardInterrupt):
        vectors(encoder, key, sentences[:60], prompts, tmp_path / "b", "x")
    encoder.encode = lambda texts, *rest, **more: calls.append(len(texts)) or real(texts, *rest, **more)
    calls.clear()
    again = vectors(encoder, key, sentences[:60], prompts, tmp_path / "b", "x")
    assert np.array_equal(again, whole) and sum(calls) == 60 - 16
    calls.clear()
    vectors(encoder, key, sentences[:60], prompts, tmp_path / "b", "x")
    assert not calls, "found again by what is in it"
    vectors(encoder, key, sentences[:59], prompts[:59], tmp_path / "b", "x")
    assert sum(calls) == 59
    np.testing.assert_allclose(whole[1], real(sentences[1], "Find:"), atol=1e-6)


def test_the_key_of_an_encoder_changes_with_its_weights(base, tmp_path):
    first = encoder_key(Encoder.from_pretrained(base))
    assert first == encoder_key(Encoder.from_pretrained(base))
    from transformers import AutoModelForCausalLM

    other = tmp_path / "other"
    shutil.copytree(base, other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[[5, 6]] = rows[[6, 5]]
    model.save_pretrained(other)
    assert encoder_key(Encoder.from_pretrained(other)) != first


# bad input


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (["--number", 0], 2, "--number is 0; mine 1 to 7 negatives a row"),
        (["--number", 8], 2, "--number is 8; mine 1 to 7"),
        (["--depth", 2], 2, "--depth is 2; use at least as many candidates as negatives (4)"),
        (["--relative", 1.5], 2, "--relative is 1.5; use a share of the positive's score"),
        (["--absolute", -1], 2, "--absolute is -1.0; use a distance"),
        (["--by", "bm25", "--faiss", "Flat"], 2, "--faiss searches the encoder's vectors"),
        (["--task", "question-dk"], 2, "task: no task 'question-dk'; did you mean 'question-da'?"),
        (["--query", "sp"], 1, "line 1: the field 'sp' is absent; found query, positive, doc"),
        (["--corpus", "gone.jsonl"], 1, "gone.jsonl: file not found"),
        (["--cross-encoder", "gone/model"], 1, "gone/model: no cross-encoder can be loaded"),
    ],
)
def test_bad_options_are_one_sentence(mined, options, code, part):
    told = mined(*options, expect=code)[1].splitlines()[-1]
    assert told.startswith("l2v: ") and part in told


def test_bad_data_and_bad_places(mined, tmp_path, base, capsys):
    assert "out.csv: write to a .jsonl or .parquet file" in mined(out="out.csv", expect=1)[1]
    mined()
    assert "out.jsonl: the file exists; remove it or choose another --out" in mined(expect=1)[1]
    assert (
        "line 2: 'positive' is empty"
        in mined(rows=[{"query": "a", "positive": "b"}, {"query": "a", "positive": ""}], expect=1, out="b.jsonl")[1]
    )
    (tmp_path / "file").write_text("")
    told = mined(out="file/c.jsonl", expect=1)[1]
    assert "file/c.jsonl.work" in told and "cannot be written" in told
    assert (
        cli.main(
            ["data", "mine", str(tmp_path / "no"), str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "d.jsonl")]
        )
        == 1
    )
    assert "l2v: " in capsys.readouterr().err
