"""`l2v search`: places of the hits, JSON, queries from a prompt and from a pipe, and what is kept for the next search."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support.made_run import make_run

from l2v import Encoder
from l2v.commands import main as cli
from l2v.data import sample


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_recipe, base):
    """A run that was trained with an instruction before queries; all its stages are done."""
    folder = tmp_path_factory.mktemp("searched")
    given = {"base.model": str(base), "base.init": "pretrained", "base.config": None, "base.tokenizer": None}
    file = tiny_recipe(folder, **given)
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    del tree["stages"]["simcse"]
    tree["stages"]["supervised"]["data"] = [{"path": str(folder / "pairs.jsonl"), "task": "forum-da"}]
    file.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return make_run(file)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def search(run, capsys, monkeypatch):
    """search(*arguments, stdin=None, model=run, expect=0) -> (stdout, stderr)"""

    def search(*arguments, stdin=None, model=run, expect=0):
        capsys.readouterr()
        if stdin is not None:
            monkeypatch.setattr("sys.stdin", stdin)
        assert cli.main(["search", str(model), *map(str, arguments)]) == expect
        return capsys.readouterr()

    return search


def hits(out):
    return [json.loads(line) for line in out.splitlines()]


def test_a_hit_has_its_place_and_its_row(search, run, tmp_path, sentences):
    """Blank lines and empty texts are counted as lines, and skipped as texts."""
    file = tmp_path / "svar.csv"
    rows = [f'{9000 + i},"{text}",byen\n' for i, text in enumerate(sentences[:6])]
    file.write_text("id,svar,emne\n" + "".join(rows[:2]) + "9999,,tom\n" + "".join(rows[2:]), encoding="utf-8")
    said = search(sentences[4], "--texts", file, "--instruction", "", "--top", "6", "--json")
    assert said.err.splitlines()[0].startswith(f"{file}: columns guessed by their names: text: svar")
    found = hits(said.out)
    assert [hit["rank"] for hit in found] == [1, 2, 3, 4, 5, 6] and found[0]["score"] == pytest.approx(1, abs=1e-5)
    lines = file.read_text(encoding="utf-8").splitlines()
    for hit in found:
        at = hit["row"]
        assert (
            hit["text"] in lines[at - 1]
            and lines[at - 1].startswith(hit["id"])
            and hit["where"] == f"{file}, line {at}"
        )
        assert hit["file"] == str(file) and hit["fields"] == {"id": hit["id"], "svar": hit["text"], "emne": "byen"}
    (tmp_path / "b.jsonl").write_text(json.dumps({"id": 1, "text": sentences[0]}) + "\n", encoding="utf-8")
    assert f"{tmp_path / 'b.jsonl'}, line 1, id 1\n" in search("hund", "--texts", tmp_path / "b.jsonl").out
    shown = search(sentences[4], "--texts", file, "--instruction", "").out.splitlines()
    assert shown[:2] == [f"1.000  {sentences[4]}", f"       {file}, line 7, id 9004"] and len(shown) == 6
    encoder = Encoder.from_pretrained(run)
    texts = [hit["text"] for hit in found]
    expected = encoder.similarity(encoder.encode(sentences[4]), encoder.encode_document(texts))[0]
    np.testing.assert_allclose([hit["score"] for hit in found], expected, atol=1e-5)
    assert list(expected) == sorted(expected, reverse=True)


def test_queries_have_the_instruction_of_the_training(search, run, tmp_path, sentences):
    (tmp_path / "a.txt").write_text("\n".join(sentences[:5]), encoding="utf-8")
    found = hits(search("en hund", "--texts", tmp_path / "a.txt", "--top", 5, "--json").out)
    encoder = Encoder.from_pretrained(run)
    query = encoder.encode("en hund", instruction="Find et godt svar på indlægget:")
    assert np.abs(query - encoder.encode("en hund")).max() > 1e-3
    for hit in found:
        assert hit["score"] == pytest.approx(float(query @ encoder.encode(hit["text"])), abs=1e-5)


def test_files_of_every_kind_and_folders_of_them(search, tmp_path, sentences, write_jsonl):
    folder = tmp_path / "mange"
    folder.mkdir()
    (folder / "a.txt").write_text(f"{sentences[0]}\n\n{sentences[1]}\n", encoding="utf-8")
    write_jsonl(folder / "b.jsonl", [{"_id": "x7", "text": sentences[2]}, {"_id": "x8", "text": " "}])
    pq.write_table(pa.table({"text": [sentences[3], None, sentences[4]]}), folder / "c.parquet")
    (folder / "notes.pdf").write_bytes(b"%PDF")
    found = hits(search("hund", "--texts", folder, "--top", 9, "--json").out)
    places = {(hit["text"], hit["where"], hit["id"]) for hit in found}
    assert places == {
        (sentences[0], f"{folder / 'a.txt'}, line 1", None),
        (sentences[1], f"{folder / 'a.txt'}, line 3", None),
        (sentences[2], f"{folder / 'b.jsonl'}, line 1", "x7"),
        (sentences[3], f"{folder / 'c.parquet'}, row 1", None),
        (sentences[4], f"{folder / 'c.parquet'}, row 3", None),
    }
    assert len(hits(search("hund", "--texts", folder / "*.txt", "--top", 9, "--json").out)) == 2


def test_a_query_on_each_line_of_a_pipe(search, tmp_path, sentences):
    (tmp_path / "a.txt").write_text("\n".join(sentences[:4]), encoding="utf-8")
    given = f"{sentences[1]}\n\n  {sentences[3]}  \n"
    found = hits(search("--texts", tmp_path / "a.txt", "--top", 2, "--json", stdin=io.StringIO(given)).out)
    assert [(hit["query"], hit["rank"]) for hit in found] == [(sentences[at], rank) for at in (1, 3) for rank in (1, 2)]
    shown = search("--texts", tmp_path / "a.txt", "--top", 1, stdin=io.StringIO(given)).out.splitlines()
    assert [line for line in shown if line.startswith("> ")] == [f"> {sentences[1]}", f"> {sentences[3]}"]
    said = search("--texts", tmp_path / "a.txt", stdin=io.TextIOWrapper(io.BytesIO(b"h\xf8st\n"), "utf-8"), expect=1)
    assert "the queries of the standard input are not UTF-8" in said.err


def test_a_prompt_keeps_the_model_loaded(search, tmp_path, sentences, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(sentences[:4]), encoding="utf-8")
    loads, load = [], Encoder.from_pretrained
    monkeypatch.setattr(Encoder, "from_pretrained", lambda *a, **k: loads.append(a) or load(*a, **k))
    typed = iter(["hunden", "halv \udcf8", "katten"])
    monkeypatch.setattr("builtins.input", lambda *_: next(typed, ""))
    said = search("--texts", tmp_path / "a.txt", "--top", 1, stdin=Terminal())
    assert len(loads) == 1 and len(said.out.splitlines()) == 4  # two lines a hit
    assert said.err.count("query (an empty line ends): ") == 4
    assert "l2v: text 0 holds half of a surrogate pair" in said.err


def test_vectors_are_kept_by_what_decides_them(search, run, tmp_path, sentences, monkeypatch):
    (tmp_path / "a.txt").write_text("\n".join(sentences[20:24]), encoding="utf-8")
    encoded, encode = [], Encoder.encode
    monkeypatch.setattr(
        Encoder, "encode", lambda self, texts, *a, **k: encoded.append(texts) or encode(self, texts, *a, **k)
    )

    def corpora(*options):
        encoded.clear()
        out = search("hund", "--texts", tmp_path / "a.txt", "--json", *options).out
        return sum(isinstance(texts, list) for texts in encoded), out

    (first, out), (again, same) = corpora(), corpora()
    assert (first, again) == (1, 0) and out == same
    assert corpora("--precision", "bf16")[0] == 1  # other vectors
    newest = max((run / ".search").glob("*.npy"), key=lambda file: file.stat().st_mtime)
    assert not list((run / ".search").glob(".*"))
    newest.write_bytes(b"half a file")
    assert corpora("--precision", "bf16")[0] == 1 and corpora("--precision", "bf16")[0] == 0


def test_without_texts_it_searches_the_sample(search, base, monkeypatch):
    few = dict(list(sample.passages().items())[:5])
    monkeypatch.setattr(sample, "passages", lambda: few)
    said = search("lus", "--json", "--top", 1, model=base)
    assert "searching the 5 passages of the Danish sample; --texts FILE searches your own" in said.err
    [hit] = hits(said.out)
    assert hit["id"] in few and hit["where"] == f"sample:da, passage {hit['id']}" and hit["row"] is None
    assert said.err.splitlines()[-1].startswith("next: l2v search ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["  "], "the query is empty; give a text to search for"),
        (["hund", "--top", "0"], "--top is 0; show at least 1"),
        (
            ["hund", "--texts", "væk.csv"],
            "væk.csv: file not found; give a file, a folder, hub:NAME or sample:da/train",
        ),
        (["hund", "--texts", "{tmp}/tal.jsonl"], "tal.jsonl, line 1: the field 'text' is text; found int"),
        (["hund", "--texts", "{tmp}/tom.txt"], "tom.txt: holds no text to search"),
        (
            ["hund", "--texts", "{tmp}/a.csv", "--column", "tekts"],
            "the field 'tekts' is absent; found id, tekst; did you mean",
        ),
    ],
)
def test_mistakes_are_sentences(search, tmp_path, arguments, says):
    (tmp_path / "tal.jsonl").write_text('{"text": 7}\n')
    (tmp_path / "tom.txt").write_text("\n \n")
    (tmp_path / "a.csv").write_text("id,tekst\n1,hund\n2,kat\n")
    said = search(*(a.format(tmp=tmp_path) for a in arguments), expect=1)
    assert says in said.err and "Traceback" not in said.err and not said.out
