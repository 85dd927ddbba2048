import csv
import gzip

import datasets
import pytest

from l2v.data.sources import open_rows
from l2v.data.tables import MAX_FIELD, layout, read_table
from l2v.errors import UserError
from l2v.recipe import Source

LINES = 'Første linje om byen.\nAnden linje, om havet; og skoven.\n\nTredje "linje"\tmed det hele.'
ROWS = [
    {"spørgsmål": "Hvor ligger Ærø?", "svar": LINES},
    {"spørgsmål": "Hvad, om noget, er 1,5; 2,5?", "svar": "Tal, som man skriver dem."},
    {"spørgsmål": "Hvem?", "svar": "æøå " * 60_000 + "slut"},
]


def put(path, rows=ROWS, delimiter=",", encoding="utf-8", quoting=csv.QUOTE_MINIMAL, ends="\r\n"):
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "wt", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter, quoting=quoting, lineterminator=ends)
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(path) -> list[dict]:
    return [row for _, row in read_table(path, path.name)]


def refused(path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(path.name) and "\n" not in message and caught.value.exit_code == 1
    return message


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("ends", ["\r\n", "\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL], ids=["minimal", "all"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
@pytest.mark.parametrize("name", ["a.csv", "A.CSV", "a.tsv", "a.csv.gz"])
def test_every_way_of_writing_gives_the_same_rows(tmp_path, name, delimiter, quoting, ends, encoding):
    path = put(tmp_path / name, delimiter=delimiter, quoting=quoting, encoding=encoding, ends=ends)
    assert layout(path, name).delimiter == delimiter
    assert read(path) == ROWS


@pytest.mark.parametrize(
    ("content", "delimiter", "names"),
    [
        ("spørgsmål;svar\nHvad, hvem, hvor?;Det, den, der.\n", ";", ["spørgsmål", "svar"]),
        ("a, b;c\n1, 2;x\n3;y\n4;z\n", ";", ["a, b", "c"]),  # the rows decide where the header does not
        ("tekst\nHej\nDer\n", ",", ["tekst"]),
        ('tekst\n"Hej, der"\n', ",", ["tekst"]),
        ("tekst\nHej, der\n", ";", ["tekst"]),  # one column: its texts need no quotes
        ("tekst\nHej, der\nHej; du\n", "\t", ["tekst"]),
        ("\n \nid;tekst\n1;Hej\n", ";", ["id", "tekst"]),
        (";query;positive\n0;a;b\n", ";", ["query", "positive"]),  # an index without a name
        ("query,positive,\na,b,\n", ",", ["query", "positive"]),
        ("query;positive\n", ";", ["query", "positive"]),
        ("query,positive\nto\nfelter, og så, flere\n", ",", ["query", "positive"]),
    ],
)
def test_the_delimiter_is_read_from_the_header_and_the_first_rows(tmp_path, content, delimiter, names):
    path = tmp_path / "a.csv"
    path.write_text(content)
    found = layout(path, "a.csv")
    assert (found.delimiter, found.names) == (delimiter, names)


def test_rows_without_text_and_columns_without_a_name_are_skipped(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("query;;positive;\n\na;0;b;\n;;;\n ; ;;\nc;1;d;\n")
    assert read(path) == [{"query": "a", "positive": "b"}, {"query": "c", "positive": "d"}]


def test_a_place_is_the_line_where_the_row_begins(tmp_path):
    path = put(tmp_path / "a.csv", rows=[*ROWS[:2], {"spørgsmål": "tre", "svar": "3"}], delimiter=";")
    lines = path.read_text().splitlines()
    places = [where for where, _ in read_table(path, "a.csv")]
    assert places == [f"a.csv, line {at}" for at in (2, 6, 7)] and lines[6] == "tre;3"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["a.csv: the file is empty"]),
        ("\ufeff \n\n", ["a.csv: the file is empty"]),
        ("a,b\n1,2\n\n3,4,5\n", ["a.csv, line 4: 3 fields where the header has 2 columns", "comma or a line break"]),
        ("a;b\n1;2\n3\n", ["a.csv, line 3: 1 field where the header has 2 columns", "semicolon"]),
        ('a;b\n"1\n1";2\n3;4;5\n', ["a.csv, line 4: 3 fields"]),
        ('a,b\n1,2\n3,"4\n5,6\n7,8\n', ["a.csv, line 3: a quote is opened here and never closed"]),
        ('a,b\n1,2\n3,"4"5\n', ["a.csv, line 3: a quote is closed before its field ends"]),
        ("1,2\n3,4\n", ["a.csv, line 1: no header; the first line of a table names its columns"]),
        (",\n,\n1,2\n", ["a.csv, line 1: no header"]),
        (f"{'Hej med dig. ' * 10};Hej\nx;y\n", ["a.csv, line 1: no header"]),
        ("tekst,Tekst,tekst\n1,2,3\n", ["a.csv, line 1: the column 'tekst' appears twice"]),
    ],
)
def test_a_malformed_table_is_one_sentence_with_its_line(tmp_path, content, parts):
    message = refused(tmp_path / "a.csv", content)
    for part in parts:
        assert part in message, message


def test_a_quote_that_nobody_closes_does_not_take_the_whole_file_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("l2v.data.tables.MAX_FIELD", 5000)
    text = 'a,b\n1,"2\n' + "3,4\n" * 5000
    assert MAX_FIELD > 1_000_000
    assert "a.csv, line 2: a quote is opened here and never closed" in refused(tmp_path / "a.csv", text)


def test_a_torn_archive(tmp_path):
    whole = gzip.compress(b"a,b\n" + b"1,2\n" * 100)
    assert "a.csv.gz: cannot be read to the end" in refused(tmp_path / "a.csv.gz", whole[:-12])
    assert "a.csv.gz: cannot be read to the end" in refused(tmp_path / "a.csv.gz", b"a,b\n1,2\n")


def test_tables_train_as_json_lines_do(tmp_path, write_jsonl):
    table = open_rows([Source(str(put(tmp_path / "a.csv", delimiter=";")))], "pairs").to_list()
    same = [{"query": row["spørgsmål"], "positive": row["svar"]} for row in ROWS]
    assert table == open_rows([Source(write_jsonl(tmp_path / "a.jsonl", same))], "pairs").to_list()
    assert table[0]["positive"] == LINES


def test_rows_of_a_table_are_memory_mapped_and_read_again_once_edited(tmp_path):
    path = put(tmp_path / "a.csv")
    source = [Source(str(path), query="spørgsmål", positive="svar")]
    assert open_rows(source, "pairs").cache_files
    put(path, rows=ROWS[:2])
    assert len(open_rows(source, "pairs")) == 2


def test_an_empty_cell_is_absent(tmp_path):
    rows = [
        {"query": "a", "positive": "b", "negative_10": "ti", "negative_2": " ", "negative_1": "et", "how": ""},
        {"query": "c", "positive": "d", "negative_10": "", "negative_2": "", "negative_1": "", "how": "Find svaret"},
    ]
    path = str(put(tmp_path / "a.csv", rows))
    read = open_rows([Source(path, negatives="negative_*", instruction="how")], "pairs").to_list()
    assert [row["negatives"] for row in read] == [["et", "ti"], []]
    assert [row["instruction"] for row in read] == [None, "Find svaret"]
    assert open_rows([Source(path, negatives="negative_10")], "pairs")["negatives"][:] == [["ti"], []]


@pytest.mark.parametrize("keys", [{}, {"skip_empty": True}])
def test_an_empty_text_is_refused_or_skipped_as_in_other_files(tmp_path, keys):
    path = tmp_path / "a.csv"
    path.write_text("query,positive\na,b\nc,\n")
    if keys:
        assert len(open_rows([Source(str(path), **keys)], "pairs")) == 1
    else:
        with pytest.raises(UserError, match=r"a\.csv, line 3: 'positive' is empty; remove the row or set skip_empty"):
            open_rows([Source(str(path))], "pairs")


def test_a_header_alone_is_an_empty_data_set(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("query,positive\n")
    with pytest.raises(UserError, match="the data set is empty"):
        open_rows([Source(str(path))], "pairs")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("keys", "hint"),
    [({"negatives": "negativ"}, "negative"), ({"instruction": "instructions"}, "instruction"), ({"query": "querry"}, "query")],
)  # fmt: skip
def test_a_named_column_that_no_row_has_is_refused_with_the_nearest(tmp_path, write_jsonl, kind, keys, hint):
    rows = [{"query": f"q{i}", "positive": "p", "negative": "n", "instruction": "i"} for i in range(3)]
    path = tmp_path / f"a.{kind}"
    if kind == "csv":
        put(path, rows)
    elif kind == "jsonl":
        write_jsonl(path, rows)
    else:
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    ((key, column),) = keys.items()
    if key != "query":  # under the key's own name it may be absent: mining writes it only where there are any
        assert len(open_rows([Source(str(path), document_instruction="document_instruction")], "pairs")) == 3
    with pytest.raises(UserError) as caught:
        open_rows([Source(str(path), **keys)], "pairs")
    found = f"the field '{column}' is absent; found query, positive, negative, instruction; did you mean '{hint}'?"
    assert found in str(caught.value)
