"""Small vectors: the codes against loops, sentence-transformers and the training's; recall by hand; the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from l2v.commands.main import main
from l2v.errors import UserError
from l2v.evaluation import small_vectors as small
from l2v_kernels.info_nce.quantize import codes, inverse_steps


@pytest.fixture(scope="module")
def vectors():
    """60 documents and 15 queries near some of them, 70 wide: unequal lengths, and a vector of zeros."""
    generator = np.random.default_rng(0)
    documents = generator.standard_normal((60, 70)).astype(np.float32) * generator.uniform(0.5, 3, (60, 1))
    queries = documents[:15] + 0.8 * generator.standard_normal((15, 70))
    documents[59] = 0
    return queries.astype(np.float32), documents.astype(np.float32)


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_codes_are_those_of_the_training(vectors, kind):
    x = torch.from_numpy(vectors[1])
    want = codes(x, inverse_steps(x, kind, 70), kind).numpy()
    if kind == "int8":
        assert np.array_equal(small.int8(vectors[1]), want) and np.abs(want[:59]).max(1).min() == 127
    else:
        assert np.array_equal(small.signs(small.bits(vectors[1][:59]), 70), want[:59])


def test_codes_of_sentence_transformers(vectors):
    library = pytest.importorskip("sentence_transformers.util.quantization")
    x = small.unit(vectors[1][:59])
    ranges = small.ranges(x)
    theirs = library.quantize_embeddings(x, "uint8", ranges=ranges)
    assert (
        np.abs(small.uint8(x, ranges).astype(int) - theirs.astype(int)).max() <= 1
    )  # the border of a step, in float32
    assert (small.uint8(x, ranges) == theirs).mean() > 0.99
    even = x[:, :64]
    assert np.array_equal(small.bits(even), library.quantize_embeddings(even, "ubinary"))


def test_uint8_is_within_half_a_step(vectors):
    x = small.unit(vectors[1])
    ranges = small.ranges(x)
    back = small.from_uint8(small.uint8(x, ranges), ranges)
    step = (ranges[1] - ranges[0]) / 255
    assert (np.abs(back - x) <= 0.501 * step + 1e-7).all()
    same = np.ones((3, 2), np.float32)  # a dimension without a range
    assert np.array_equal(small.from_uint8(small.uint8(same, small.ranges(same)), small.ranges(same)), same)


def test_distances_bit_by_bit(vectors):
    a, b = small.bits(vectors[0]), small.bits(vectors[1])
    assert a.shape == (15, 9) and a.dtype == np.uint8
    want = [[sum((x > 0) != (y > 0) for x, y in zip(q, d, strict=True)) for d in vectors[1]] for q in vectors[0]]
    assert small.hamming(a, b).tolist() == want


def test_rescoring_reads_only_the_candidates(vectors):
    queries, documents = small.unit(vectors[0]), small.unit(vectors[1])
    a, b = small.bits(queries), small.bits(documents)
    for times in (1, 3):
        found = small.rescored(queries, a, b, documents, 10, times)
        for row, distances in enumerate(small.hamming(a, b)):
            candidates = np.argsort(distances, kind="stable")[: 10 * times]
            best = sorted(candidates, key=lambda at: -float(queries[row] @ documents[at]))[:10]
            assert set(found[row]) == set(best)
    everything = small.rescored(queries, a, b, documents, 10, 6)
    assert np.array_equal(everything, small.nearest(queries @ documents.T, 10))


def test_recall_by_hand(vectors):
    rows = small.compare(*vectors, [32, 8])
    named = {(row.name, row.dimensions): row for row in rows}
    assert len(rows) == 21 and [row.dimensions for row in rows] == [70] * 7 + [32] * 7 + [8] * 7
    assert named["float32", 70].recall == 1 and named["float32", 70].size == 280
    queries, documents = (x[:, :8] / np.linalg.norm(x[:, :8], axis=1, keepdims=True).clip(1e-9) for x in vectors)
    exact = np.argsort(-(small.unit(vectors[0]) @ small.unit(vectors[1]).T), axis=1)[:, :10]
    cut = np.argsort(-(queries @ documents.T), axis=1)[:, :10]
    want = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, cut, strict=True)])
    assert named["float32", 8].recall == pytest.approx(want) and want < 0.9
    assert named["int8", 70].recall > 0.95 and named["int8", 70].size == 70
    assert named["binary", 70].size == 9 and named["binary", 8].size == 1
    plain, by_signs, by_int8 = (
        named[name, 70].recall for name in ("binary", "binary, rescored by signs", "binary, rescored by int8")
    )
    assert plain < 0.9 and by_int8 > max(plain, by_signs) and by_signs >= plain
    for row in rows:
        assert row.low <= row.recall <= row.high


def test_blocks_change_nothing(vectors, monkeypatch):
    whole = small.compare(*vectors, [16])
    monkeypatch.setattr(small, "BLOCK", 120)
    assert small.compare(*vectors, [16]) == whole


@pytest.mark.parametrize(
    ("arguments", "options", "part"),
    [
        ((3, 60), {"dimensions": [71]}, "--dimensions 71; give whole numbers from 1 to 70, the width of the vectors"),
        ((3, 60), {"dimensions": [0]}, "--dimensions 0; give"),
        ((3, 12), {}, "12 texts and 3 queries; recall@10 needs 20 texts and a query"),
        ((0, 60), {}, "60 texts and 0 queries"),
        ((3, 60), {"times": 0}, "--rescore is 0; give a whole number from 1"),
    ],
)
def test_bad_input_is_named(vectors, arguments, options, part):
    with pytest.raises(UserError) as caught:
        small.compare(vectors[0][: arguments[0]], vectors[1][: arguments[1]], **options)
    assert part in str(caught.value)


def test_the_command_writes_table_numbers_and_picture(base, tmp_path, sentences, capsys, write_jsonl):
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": sentence} for sentence in sentences[:40]])
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"query": sentence[:20]} for sentence in sentences[:7]])
    out = tmp_path / "small"
    given = ["quantize", str(base), "--texts", str(texts), "--queries", str(queries)]
    assert main([*given, "--dimensions", "16,8", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "7 queries, 40 texts" in said and "| binary, rescored by int8 | 16 |" in said
    assert (out / "small_vectors.md").read_text() in said
    facts = json.loads((out / "small_vectors.json").read_text())
    assert facts["rows"][0] == facts["rows"][0] | {"name": "float32", "dimensions": 32, "size": 128.0, "recall": 1.0}
    assert (out / "small_vectors.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert main(["quantize", str(base), "--texts", str(texts)]) == 1
    assert "--texts and --queries belong together" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*given, "--dimensions", "16;8"])
    assert "'16;8' is no list of whole numbers, such as 256,128" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    again = [*given, "--out", str(tmp_path / "file")]
    assert main(again) == 1 and f"{Path(tmp_path, 'file')}: cannot be written" in capsys.readouterr().err
