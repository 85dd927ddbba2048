"""`l2v search --index`: exact over a file of `l2v encode`, and refused for another model."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from l2v import Encoder
from l2v.commands import main as cli
from l2v.encoding import index as indexes
from l2v.encoding import rows
from l2v.encoding.index import Index


@pytest.fixture(scope="module")
def encoder(base):
    return Encoder.from_pretrained(base)


@pytest.fixture(scope="module")
def files(base, tmp_path_factory, sentences):
    """The same 60 texts encoded to the three formats."""
    folder = tmp_path_factory.mktemp("indexes")
    lines = [f"{9000 + n},{text},by{n % 3}" for n, text in enumerate(sentences[:60])]
    (folder / "a.csv").write_text("id,svar,emne\n" + "\n".join(lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "CHUNK_ROWS", 7)
        for out in ("a.npy", "a.safetensors", "a.parquet"):
            assert cli.main(["encode", str(base), str(folder / "a.csv"), "--out", str(folder / out)]) == 0
    return folder


@pytest.fixture
def search(base, capsys):
    def search(*arguments, model=base, expect=0):
        capsys.readouterr()
        code = cli.main(["search", str(model), *map(str, arguments)])
        said = capsys.readouterr()
        assert code == expect, said.err
        return said

    return search


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors", "a.parquet"])
def test_search_is_exact_and_names_the_row(search, encoder, files, sentences, name, monkeypatch):
    monkeypatch.setattr(indexes, "BLOCK", 11)  # 60 vectors in six blocks
    said = search("Hvem cykler?", "--index", files / name, "--top", 9, "--json")
    found = [json.loads(line) for line in said.out.splitlines()]
    scores = encoder.similarity(encoder.encode("Hvem cykler?"), encoder.encode(sentences[:60]))[0]
    best = np.argsort(-scores, kind="stable")[:9]
    assert [hit["id"] for hit in found] == [str(9000 + n) for n in best]
    np.testing.assert_allclose([hit["score"] for hit in found], scores[best], atol=1e-5)
    assert f"searching 60 vectors of {files / name}" in said.err
    first = found[0]
    if name == "a.parquet":
        assert first["text"] == sentences[best[0]] and first["fields"]["emne"] == f"by{best[0] % 3}"
        assert first["where"] == f"{files / name}, row {best[0] + 1}"
    else:
        assert first["text"] == "" and first["where"] == f"{files / 'a.csv'}, line {best[0] + 2}"


def test_vectors_that_were_not_normalised(encoder, files, tmp_path):
    """Cosines all the same; and a vector of zeros is nearest to nothing."""
    vectors = np.load(files / "a.npy") * np.linspace(0.1, 9, 60, dtype=np.float32)[:, None]
    vectors[7] = 0
    np.save(tmp_path / "a.npy", vectors)
    facts = json.loads((files / "a.npy.json").read_text(encoding="utf-8")) | {"normalized": False}
    (tmp_path / "a.npy.json").write_text(json.dumps(facts), encoding="utf-8")
    query = encoder.encode("en hund")
    at, scores = Index(str(tmp_path / "a.npy")).search(3 * query, 60)
    expected = np.load(files / "a.npy") @ query
    expected[7] = 0
    np.testing.assert_allclose(scores, np.sort(expected)[::-1], atol=1e-5)
    assert list(at) == list(np.argsort(-expected, kind="stable"))


def test_an_index_of_another_model_is_refused(search, base, files, tmp_path):
    """Also if only one weight of the last layer differs, in a file of the same name and size."""
    other = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[3, 3] += 0.5
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(base).save_pretrained(other)
    for name in ("a.npy", "a.safetensors", "a.parquet"):
        said = search("hund", "--index", files / name, model=other, expect=1)
        assert "holds vectors of another model" in said.err and "encode the texts again" in said.err
    said = search("hund", "--index", files / "a.npy", "--precision", "bf16", expect=1)
    assert "were computed with --precision fp32" in said.err and "give --precision fp32" in said.err
    said = search("hund", "--index", files / "a.npy", "--length", 99, expect=1)
    assert "were computed with --length 512" in said.err


def test_files_that_are_no_index(search, files, tmp_path):
    np.save(tmp_path / "b.npy", np.zeros((3, 32), np.float32))
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    for name in ("b.npy", "c.parquet"):
        assert "no index; l2v encode MODEL FILE --out" in search("hund", "--index", tmp_path / name, expect=1).err
    assert "no such file" in search("hund", "--index", tmp_path / "d.npy", expect=1).err
    assert "a.csv: no index; l2v encode MODEL FILE --out " in (
        said := search("hund", "--index", files / "a.csv", expect=1).err
    )
    assert said.rstrip().endswith("a.parquet writes one")
    for name in ("a.npy", "a.safetensors", "a.parquet"):
        data = (files / name).read_bytes()
        for kept in (files / name, files / f"{name}.json"):
            if kept.exists():
                (tmp_path / kept.name).write_bytes(kept.read_bytes())
        (tmp_path / name).write_bytes(data[: len(data) - 400])
        said = search("hund", "--index", tmp_path / name, expect=1)
        assert ("damaged" in said.err) if name != "a.parquet" else ("no index" in said.err)
    assert "not both" in search("hund", "--index", files / "a.npy", "--texts", files / "a.csv", expect=2).err
    assert "needs --index" in search("hund", "--approximate-above", 3, expect=2).err


def test_approximate_above_a_size(search, files):
    pytest.importorskip("faiss")
    exact = search("hund", "--index", files / "a.npy", "--json", "--approximate-above", 60)
    assert "approximate" not in exact.err and not list(files.glob("*.hnsw"))
    for _ in range(2):  # built, then read
        near = search("hund", "--index", files / "a.npy", "--json", "--approximate-above", 59)
        assert "approximate: HNSW may miss" in near.err and len(list(files.glob("*.hnsw"))) == 1
        assert [json.loads(a)["id"] for a in near.out.splitlines()] == [
            json.loads(a)["id"] for a in exact.out.splitlines()
        ]
