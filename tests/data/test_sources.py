import gzip
import json
import os

import datasets
import pytest

from l2v.data import sample
from l2v.data.sources import open_rows
from l2v.errors import UserError
from l2v.recipe import Source

KINDS = ("documents", "sentences", "pairs")


def rows(path, kind="sentences", **columns) -> list[dict]:
    return open_rows([Source(str(path), **columns)], kind).to_list()


def refused(path, kind="sentences", **columns) -> str:
    with pytest.raises(UserError) as caught:
        open_rows([Source(str(path), **columns)], kind)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and caught.value.exit_code == 1
    return message


@pytest.fixture
def write(tmp_path):
    """write("name", str or bytes) -> its path."""

    def run(name: str, content: str | bytes):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return run


TWO = '{"text": "Æblet er rødt.", "id": 1}\n\n{"text": "  Å \\n"}\n'


@pytest.mark.parametrize("kind", ["documents", "sentences"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.b.jsonl", "a.jsonl.gz"])
def test_json_lines(write, kind, name):
    path = write(name, gzip.compress(TWO.encode()) if name.endswith(".gz") else TWO)
    assert rows(path, kind) == [{"text": "Æblet er rødt."}, {"text": "Å"}]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_files_have_a_row_a_line(write, name):
    content = "Første linje.\n\n  Anden linje. \r\nTredje".encode()
    path = write(name, gzip.compress(content) if name.endswith(".gz") else content)
    assert rows(path) == [{"text": "Første linje."}, {"text": "Anden linje."}, {"text": "Tredje"}]


def test_a_column_of_another_name(write):
    path = write("a.jsonl", '{"tekst": "Hej."}\n')
    assert rows(path, text="tekst") == [{"text": "Hej."}]


PAIR = {"query": "Hvad?", "positive": "Det.", "negatives": ["Ikke det.", "Heller ikke."], "how": "Find svaret"}


def test_pairs(write):
    path = write("a.jsonl", json.dumps(PAIR))
    pair = {"query": "Hvad?", "positive": "Det.", "negatives": ["Ikke det.", "Heller ikke."]}
    without = {"instruction": None, "document_instruction": None}
    assert rows(path, "pairs") == [pair | without]
    assert rows(path, "pairs", instruction="how") == [pair | without | {"instruction": "Find svaret"}]
    assert rows(path, "pairs", document_instruction="how") == [pair | without | {"document_instruction": "Find svaret"}]
    renamed = write("b.jsonl", json.dumps({"spørgsmål": "Hvad?", "svar": "Det.", "forkert": "Nej."}))
    assert rows(renamed, "pairs", query="spørgsmål", positive="svar", negatives="forkert") == [
        {"query": "Hvad?", "positive": "Det.", "negatives": ["Nej."]} | without
    ]


@pytest.mark.parametrize("negatives", [None, "", [], ["", "  "], "absent"])
def test_missing_negatives_are_absent_and_never_empty_texts(write, negatives):
    pair = {k: v for k, v in PAIR.items() if k != "negatives"}
    path = write("a.jsonl", json.dumps(pair if negatives == "absent" else pair | {"negatives": negatives}))
    assert rows(path, "pairs")[0]["negatives"] == []


def test_empty_negatives_among_others_are_dropped(write):
    path = write("a.jsonl", json.dumps(PAIR | {"negatives": ["", " Nej. ", " "]}))
    assert rows(path, "pairs")[0]["negatives"] == ["Nej."]


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"id": [1, 2], "text": [" Æble ", "Å"]}).to_parquet(str(path))
    assert rows(path) == [{"text": "Æble"}, {"text": "Å"}]
    pairs = tmp_path / "p.parquet"
    datasets.Dataset.from_list([PAIR, PAIR | {"negatives": [""]}]).to_parquet(str(pairs))
    assert [row["negatives"] for row in rows(pairs, "pairs")] == [["Ikke det.", "Heller ikke."], []]


def test_sources_follow_one_another_and_may_be_limited(write):
    first = write("a.jsonl", "".join(f'{{"text": "a{i}"}}\n' for i in range(5)))
    second = write("b.txt", "b0\nb1\n")
    both = open_rows([Source(str(first), limit=2), Source(str(second), limit=9)], "sentences")
    assert both["text"][:] == ["a0", "a1", "b0", "b1"]


def test_rows_are_memory_mapped(write):
    path = write("a.jsonl", TWO)
    assert open_rows([Source(str(path))], "sentences").cache_files


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_an_edited_file_is_read_again(tmp_path, write_jsonl, name):
    path = tmp_path / name

    def put(text: str) -> None:
        if name.endswith("jsonl"):
            write_jsonl(path, [{"text": text}])
        else:
            datasets.Dataset.from_dict({"text": [text]}).to_parquet(str(path))

    put("år 1")
    stat = path.stat()
    assert rows(path) == [{"text": "år 1"}]
    put("år 2")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1_000_000_000))
    assert path.stat().st_size == stat.st_size
    assert rows(path) == [{"text": "år 2"}]


def test_a_fixed_file_is_read_after_an_error(write):
    path = write("a.jsonl", '{"text": ""}\n')
    assert "line 1" in refused(path)
    write("a.jsonl", '{"text": "Nu er den her."}\n')
    assert rows(path) == [{"text": "Nu er den her."}]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"text": "a"', ["line 3", "malformed JSON", "at column", "each line is one object"]),
        ("hej", ["line 3", "malformed JSON", "at column 1", "each line is one object"]),
        ('["a"]', ["line 3", "each line is one JSON object; found list"]),
        ('"a"', ["line 3", "each line is one JSON object; found str"]),
        ("null", ["line 3", "each line is one JSON object; found NoneType"]),
        ('{"tekst": "a", "id": 1}', ["line 3", "the field 'text' is absent; found tekst, id"]),
        ("{}", ["line 3", "the field 'text' is absent; found nothing"]),
        ('{"text": 5}', ["line 3", "the field 'text' is text; found int"]),
        ('{"text": null}', ["line 3", "the field 'text' is text; found NoneType"]),
        ('{"text": ""}', ["line 3", "'text' is empty; remove the row or set skip_empty: true on its source"]),
        ('{"text": " \\n\\t "}', ["line 3", "'text' is empty; remove the row or set skip_empty: true on its source"]),
        ('{"text": "\\ud800"}', ["surrogate"]),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_bad_line_is_named_with_its_remedy(write, name, line, parts):
    content = f'{{"text": "god"}}\n\n{line}\n{{"text": "god"}}\n'
    path = write(name, gzip.compress(content.encode()) if name.endswith(".gz") else content)
    message = refused(path)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"query": ""}, "line 1: 'query' is empty; remove the row or set skip_empty: true on its source"),
        ({"positive": " "}, "line 1: 'positive' is empty; remove the row or set skip_empty: true on its source"),
        ({"positive": {"a": "b"}}, "line 1: the field 'positive' is text; found dict"),
        ({"positive": ["a", 1]}, "line 1: the field 'positive' is a text or a list of texts"),
        ({"positive": ["", " "]}, "line 1: 'positive' is empty; remove the row"),
        ({"positive": "halv \ud83d"}, "line 1: 'positive' holds half of a surrogate pair, which is no text"),
        ({"negatives": [1]}, "line 1: the field 'negatives' is a text or a list of texts"),
        ({"negatives": ["a", None]}, "line 1: the field 'negatives' is a text or a list of texts"),
        ({"negatives": {"a": "b"}}, "line 1: the field 'negatives' is a text or a list of texts"),
        ({"negatives": 7}, "line 1: the field 'negatives' is a text or a list of texts"),
    ],
)
def test_a_bad_pair_is_named(write, change, part):
    assert part in refused(write("a.jsonl", json.dumps(PAIR | change)), "pairs")


def test_the_message_names_the_users_own_column(write):
    path = write("a.jsonl", '{"sp": "Hvad?", "svar": ""}\n')
    assert "line 1: 'svar' is empty" in refused(path, "pairs", query="sp", positive="svar")
    assert "the field 'svr' is absent; found sp, svar" in refused(path, "pairs", query="sp", positive="svr")


def test_a_bad_parquet_row_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": ["god", ""]}).to_parquet(str(path))
    assert "row 2: 'text' is empty; remove the row or set skip_empty: true" in refused(path)
    assert "row 1: the field 'tekst' is absent; found text" in refused(path, text="tekst")


def test_skip_empty_skips_only_empty_texts(write):
    path = write("a.jsonl", '{"text": "a"}\n{"text": " "}\n{"text": "b"}\n')
    assert rows(path, skip_empty=True) == [{"text": "a"}, {"text": "b"}]
    pairs = write("p.jsonl", "\n".join(json.dumps(PAIR | change) for change in ({}, {"positive": ""}, {"query": ""})))
    assert len(rows(pairs, "pairs", skip_empty=True)) == 1
    assert "malformed JSON" in refused(write("b.jsonl", "{\n"), skip_empty=True)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_data_set_is_refused(write, name, content):
    path = write(name, gzip.compress(content.encode()) if name.endswith(".gz") else content)
    assert "the data set is empty; it needs at least one row" in refused(path)


def test_a_data_set_of_skipped_rows_is_empty(write, tmp_path):
    path = write("a.jsonl", '{"text": ""}\n')
    assert "the data set is empty" in refused(path, skip_empty=True)
    parquet = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": [""]}).to_parquet(str(parquet))
    assert "the data set is empty" in refused(parquet, skip_empty=True)


def test_an_empty_source_beside_a_full_one(write):
    empty, full = write("a.jsonl", ""), write("b.jsonl", TWO)
    assert len(open_rows([Source(str(empty)), Source(str(full))], "sentences")) == 2


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.parquet", "gone"])
def test_a_missing_file(tmp_path, name):
    assert "file not found; give a file, a folder, hub:NAME or sample:da/train" in refused(tmp_path / name)


def test_an_empty_folder_is_no_source(tmp_path):
    assert "the folder holds no file that can be read" in refused(tmp_path)


def test_an_unknown_suffix(write):
    assert "unknown file type '.docx'; save it as .txt" in refused(write("a.docx", "text\nhej\n"))
    assert "unknown file type '.dat'; use .csv, .tsv, .jsonl, .json" in refused(write("a.dat", "text\nhej\n"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "plain"])
def test_a_damaged_gz(write, damage):
    whole = bytearray(gzip.compress(b'{"text": "hej med dig"}\n' * 300))
    if damage == "flipped":
        whole[15] ^= 0xFF
        whole[20] ^= 0xFF
    content = {"cut": bytes(whole[:-12]), "flipped": bytes(whole), "plain": TWO.encode()}[damage]
    refused(write("a.jsonl.gz", content))


@pytest.mark.parametrize("content", [b"", b"not parquet", b"PAR1 almost PAR1"])
def test_a_damaged_parquet(write, content):
    assert "not a readable Parquet file" in refused(write("a.parquet", content))


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_sample_has_documents_sentences_and_pairs(split):
    documents, sentences, pairs = (rows(f"sample:da/{split}", kind) for kind in KINDS)
    texts = {p.text for p in sample.passages().values() if p.split == split}
    assert {row["text"] for row in documents} == texts
    assert len(sentences) > len(documents) and all(row["text"] == row["text"].strip() != "" for row in sentences)
    assert {row["positive"] for row in pairs} <= texts
    assert all(row["query"] and all(n and n != row["positive"] for n in row["negatives"]) for row in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_is_held_out_is_trained_on(kind):
    def texts(split):
        return {
            text for row in rows(f"sample:da/{split}", kind) for text in (row.get("text"), row.get("query")) if text
        }

    assert not texts("train") & texts("heldout")


@pytest.mark.parametrize("path", ["sample:sv/train", "sample:da", "sample:da/test", "sample:"])
def test_an_unknown_sample(path):
    assert "no such sample; use sample:da/train or sample:da/heldout" in refused(path)


def test_a_hub_data_set_that_is_not_there():
    assert "the Hub data set cannot be loaded" in refused("hub:l2v-tests/not-there")
