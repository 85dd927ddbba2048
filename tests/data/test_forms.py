"""Files as people have them: every form and encoding gives the same rows, and what cannot be read is counted or named."""

import gzip
import json

import openpyxl
import pytest
from support.forms import FORMS, ROWS, put, table

from l2v.data import raw
from l2v.data.decoding import legacy_of
from l2v.data.find import find_files
from l2v.data.reading import Reading
from l2v.data.rows import read_source
from l2v.data.sources import open_rows
from l2v.errors import UserError
from l2v.recipe import Source


def pairs(source: Source, **options) -> tuple[list[tuple[str, str]], Reading]:
    reading = Reading(**options)
    read = [row for _, several in read_source(source, "pairs", reading) for row in several]
    return [(row["query"], row["positive"]) for row in read], reading


def refused(source: Source, kind="pairs") -> str:
    with pytest.raises(UserError) as caught:
        list(read_source(source, kind, Reading()))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows(tmp_path, name):
    path = put(tmp_path, name)
    found, reading = pairs(Source(str(path)))
    assert found == [tuple(row.values()) for row in ROWS]
    assert reading.notes[-1] == (
        f"{path}: columns guessed by their names: query: spørgsmål, positive: svar (a column that you name wins)"
    )


def test_a_folder_of_all_forms_has_the_rows_of_all(tmp_path):
    for name in FORMS:
        put(tmp_path, name)
    (tmp_path / "logo.png").write_bytes(b"\x89PNG")
    (tmp_path / ".skjult.csv").write_text("spørgsmål;svar\nx;y\n")
    (tmp_path / "report.json").write_text('{"title": "not data"}')
    notes = []
    rows = open_rows([Source(str(tmp_path))], "pairs", notes)
    assert len(rows) == len(FORMS) * len(ROWS) and rows["positive"][-1] == ROWS[-1]["svar"]
    assert f"{tmp_path}: files of other types are not read: logo.png" in notes
    assert any(f"the same in {len(FORMS) - 1} more files" in note for note in notes)
    assert any("only its sheet 'Sheet' is read, not Ark2" in note for note in notes)
    again = []  # from the cache, which keeps what reading met
    assert len(open_rows([Source(str(tmp_path))], "pairs", again)) == len(rows) and again == notes


@pytest.mark.parametrize(
    ("encoding", "said"),
    [
        ("utf-8", None), ("utf-8-sig", None), ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("utf-16-be", "UTF-16"),
        ("utf-32", "UTF-32"),
        ("cp1252", "Windows-1252"), ("cp850", "DOS code page 850"), ("mac_roman", "Mac OS Roman"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt", "a.json"])
def test_encodings(tmp_path, name, encoding, said):
    text = {
        "a.csv": table(), "a.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
        "a.txt": "\n".join(row["spørgsmål"] for row in ROWS), "a.json": json.dumps(ROWS, ensure_ascii=False, indent=1),
    }[name]  # fmt: skip
    if encoding in ("cp850",):
        text = text.replace("–", "-")
    path = tmp_path / name
    path.write_bytes(text.encode(encoding))
    kind = "sentences" if name == "a.txt" else "pairs"
    reading = Reading()
    rows = [row for _, several in read_source(Source(str(path)), kind, reading) for row in several]
    key = "text" if kind == "sentences" else "query"
    assert [row[key] for row in rows] == [row["spørgsmål"] for row in ROWS]
    assert [name for name, _ in reading.encodings.values()] == ([said] if said else [])


def test_one_line_of_another_encoding_among_utf8(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("spørgsmål;svar\nHvad er blåbær?;bær\n".encode() + "Hvad er rødgrød?;grød\n".encode("cp1252"))
    found, reading = pairs(Source(str(path)))
    assert found[1] == ("Hvad er rødgrød?", "grød")
    assert f"{path}: not valid UTF-8, read as Windows-1252 (1 line)" in reading.sentences("a")


@pytest.mark.parametrize("text", ["“Hej” – sagde hun", "It’s a ‘test’…", "§ 5 koster €", "smør", "Ærø"])
def test_punctuation_of_windows_is_not_taken_for_dos_letters(text):
    assert legacy_of(text.encode("cp1252")) == "windows-1252"


def test_excels_first_line_names_the_delimiter(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("sep=|\nspørgsmål|svar\nHvad, hvem; hvor?|Her\n")
    found, _ = pairs(Source(str(path)))
    assert found == [("Hvad, hvem; hvor?", "Her")]
    path.write_text("sep=;\nspørgsmål;svar\nHvad?;Her;der\n")
    assert "a.csv, line 3: 3 fields where the header has 2 columns" in refused(Source(str(path)))


def test_cells_of_a_workbook_are_texts(tmp_path):
    import datetime

    book = openpyxl.Workbook()
    for line in (
        ["spørgsmål", "svar", None],
        [None, None, None],
        ["Hvilket år?", 1993.0],
        ["Hvornår?", datetime.datetime(2026, 5, 1)],
    ):
        book.active.append(line)
    book.save(tmp_path / "a.xlsx")
    rows = list(raw.read_rows(tmp_path / "a.xlsx", "a.xlsx"))
    assert rows == [
        ("a.xlsx, row 3", {"spørgsmål": "Hvilket år?", "svar": "1993"}),
        ("a.xlsx, row 4", {"spørgsmål": "Hvornår?", "svar": "2026-05-01"}),
    ]


def test_a_text_file_is_a_text_a_line_or_whole(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"Første linje i {name}.\n\nAnden linje.\n")
    rows = open_rows([Source(str(tmp_path))], "documents")["text"][:]
    assert rows == ["Første linje i a.txt.", "Anden linje.", "Første linje i b.txt.", "Anden linje."]
    rows = open_rows([Source(str(tmp_path), whole=True)], "documents")["text"][:]
    assert rows == ["Første linje i a.txt.\n\nAnden linje.", "Første linje i b.txt.\n\nAnden linje."]


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ('["Hej", "med dig"]', ["Hej", "med dig"]),
        ('{"version": 1, "data": [{"text": "Hej"}, {"text": "du"}]}', ["Hej", "du"]),
        ('\n{"text": "Hej"}\n{"text": "du"}\n', ["Hej", "du"]),
        ('{"text": "Hej"}', ["Hej"]),
        ('[\n {"text": "Hej"},\n\n {"text": "du"}\n]', ["Hej", "du"]),
    ],
)
def test_json_in_its_usual_shapes(tmp_path, text, texts):
    (tmp_path / "a.json").write_text(text)
    assert open_rows([Source(str(tmp_path / "a.json"))], "documents")["text"][:] == texts


def test_several_answers_in_a_list_are_a_pair_each(tmp_path, write_jsonl):
    rows = [{"query": "Hvad?", "pos": ["A", "B", "A", " "], "neg": ["C"]}, {"query": "Hvem?", "pos": "D", "neg": []}]
    found, _ = pairs(Source(write_jsonl(tmp_path / "a.jsonl", rows)))
    assert found == [("Hvad?", "A"), ("Hvad?", "B"), ("Hvem?", "D")]


def test_empty_negatives_are_dropped_and_counted(tmp_path, write_jsonl):
    rows = [{"query": "Hvad?", "positive": "A", "negatives": ["B", "", " "]}, {"query": "Hvem?", "positive": "C"}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    notes = []
    assert open_rows([Source(path)], "pairs", notes)["negatives"][:] == [["B"], []]
    assert notes == [f"{path}: 2 empty hard negatives dropped"]


def test_a_label_of_0_is_no_pair(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("sentence1,sentence2,label\nEn hund,Et dyr,1\nEn hund,En sten,0\nEn kat,Et dyr,\n")
    found, reading = pairs(Source(str(path)))
    assert [pair[1] for pair in found] == ["Et dyr", "Et dyr"] and reading.below == 1
    assert reading.sentences("a.csv")[-1] == f"a.csv: 1 row below the smallest score skipped, the first: {path}, line 3"
    path.write_text('sentence1,sentence2,score\nEn hund,Et dyr,4.2\nEn hund,En sten,"0,3"\n')
    assert "'score' is 4.2, and only 0 and 1 say by themselves what is a pair; set min_score" in refused(
        Source(str(path))
    )
    assert len(pairs(Source(str(path), min_score=4))[0]) == 1 and len(pairs(Source(str(path), min_score=0))[0]) == 2
    path.write_text("sentence1,sentence2,label\nEn hund,Et dyr,dyr\n")
    assert len(pairs(Source(str(path)))[0]) == 1  # a topic
    assert "the field 'label' is a number; found 'dyr'" in refused(Source(str(path), score="label"))


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.csv", b"PK\x03\x04 and so on", "a zip file or an Excel workbook; give an Excel workbook the ending .xlsx"),
        ("a.txt", b"%PDF-1.7", "a PDF file; save its text as .txt"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "compressed; give it the ending .gz"),
        ("a.xlsx", b"not a workbook", "not a readable Excel workbook"),
        ("a.json", b'{"a": 1,\n "b": }', "line 2: malformed JSON"),
        ("a.json", b'{"a": {"x": 1},\n "b": {}}', "one JSON object; give a list of objects, or one object a line"),
        ("a.jsonl.zst", b"nothing", "cannot be read to the end"),
        ("a.csv", "spørgsmål;svar\nHvad?;\"Her\n".encode(), "line 2: a quote is opened here and never closed"),
    ],
)  # fmt: skip
def test_what_is_no_data_is_named(tmp_path, name, content, part):
    (tmp_path / name).write_bytes(content)
    assert part in refused(Source(str(tmp_path / name)))


def test_rows_that_cannot_be_read_are_skipped_where_asked(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("spørgsmål;svar;nr\nHvad?;A;1\nHvem;B\n;C;3\nHvor?;D;4\nHvis;E;5;6\n")
    assert "a.csv, line 3: 2 fields where the header has 3 columns" in refused(Source(str(path)))
    notes = []
    rows = open_rows([Source(str(path), skip_bad=True)], "pairs", notes)
    assert rows["query"][:] == ["Hvad?", "Hvor?"]
    assert [note.partition(": ")[2].partition(", the first")[0] for note in notes] == [
        "columns guessed by their names: query: spørgsmål, positive: svar (a column that you name wins)",
        "columns that are not used: nr",
        "2 rows that cannot be read skipped",
        "1 row with an empty text skipped",
    ]
    path.write_text("spørgsmål;svar\nHvad?;A\n" + "Hvem\n" * 2)
    with pytest.raises(UserError, match=r"2 of 3 rows cannot be read; the first: .*line 3: 1 field where"):
        open_rows([Source(str(path), skip_bad=True)], "pairs")


def test_a_wrong_file_among_right_ones(tmp_path):
    put(tmp_path, "a.csv")
    (tmp_path / "b.xlsx").write_bytes(b"not a workbook")
    (tmp_path / "c.csv").write_text("Kolonne A;Kolonne B\n1;2\n3;4\n")
    assert "b.xlsx: not a readable Excel workbook" in refused(Source(str(tmp_path)))
    found, reading = pairs(Source(str(tmp_path), skip_bad=True), keep_going=True)
    assert len(found) == 3 and reading.files == 1 and reading.lost == 2
    assert any("the field 'query' is absent; found Kolonne A, Kolonne B" in line for line in reading.examples["lost"])


def test_columns_with_a_name_of_their_own_are_offered(tmp_path, write_jsonl):
    rows = [{"query": "a", "positive": "b", "instruction": "Find:", "group": 1, "id": 7}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    _, reading = pairs(Source(path))
    assert reading.notes == [
        f"{path}: columns that are not used: instruction, group, id; to use it, set instruction: instruction on the source"
    ]
    assert pairs(Source(path, instruction="instruction"))[1].notes == [
        f"{path}: columns that are not used: group, id; to use it, set group: group on the source"
    ]


def test_names_of_files(tmp_path):
    put(tmp_path, "kunder.csv")
    with pytest.raises(UserError, match=r"kundr.csv: file not found; did you mean 'kunder.csv'\?"):
        find_files(str(tmp_path / "kundr.csv"))
    with pytest.raises(UserError, match=r"no readable file matches; use \.csv"):
        find_files(str(tmp_path / "*.jsonl"))
    (tmp_path / "below").mkdir()
    (tmp_path / "above").mkdir()
    put(tmp_path / "below", "a.csv")
    (tmp_path / "kunder.csv").rename(tmp_path / "above" / "b.csv")
    with pytest.raises(UserError, match="holds no file that can be read; folders below it do: above, below"):
        find_files(str(tmp_path))
    assert [file.name for file in find_files(str(tmp_path / "**" / "*.csv"))] == ["b.csv", "a.csv"]


def test_a_limit_spans_the_files_of_a_source(tmp_path):
    for name in ("a.csv", "b.csv"):
        put(tmp_path, name)
    notes = []
    assert len(open_rows([Source(str(tmp_path), limit=4)], "pairs", notes)) == 4
    assert any("columns guessed by their names: query: spørgsmål, positive: svar" in note for note in notes)


def test_words_and_missing_columns_of_scores(tmp_path, write_jsonl):
    path = tmp_path / "a.csv"
    path.write_text("query,positive,label\nq1,p1,True\nq2,p2,false\nq3,p3,ja\nq4,p4,nej\n")
    assert [query for query, _ in pairs(Source(str(path)))[0]] == ["q1", "q3"]
    path.write_text("query,positive\nq1,p1\n")
    assert "the field 'score' is absent; found query, positive" in refused(Source(str(path), min_score=0.5))
    assert "the field 'score' is absent" in refused(Source(str(path), score="score"))
    path.write_text("query,positive,score\nq1,p1,80%\n")
    assert "the field 'score' is a number; found '80%'" in refused(Source(str(path), min_score=0.5))
    path.write_text("query,positive,score\nq1,p1,\nq2,p2,0.9\n")
    assert [query for query, _ in pairs(Source(str(path), min_score=0.5))[0]] == ["q2"]
    rows = [{"query": f"q{n}", "positive": f"p{n}"} for n in range(120)]
    late = write_jsonl(tmp_path / "b.jsonl", [*rows, {"query": "q", "positive": "p", "label": 0, "negative": "n"}])
    assert "the field 'score' is absent" in refused(Source(late, min_score=0.5))
    notes = pairs(Source(late))[1].notes
    assert (
        f"{late}: the first rows lack the column 'label', so it was not taken for score; set score: label on the source to use it"
        in notes
    )
    assert any("set negatives: negative on the source" in note for note in notes)


def test_a_list_of_texts_is_a_text_each(tmp_path, write_jsonl):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"query": "Hvad?", "positive": ["En.", "To."]}, {"query": "Hvem?", "positive": "Tre."}]
    )
    assert open_rows([Source(path, text="positive")], "documents")["text"][:] == ["En.", "To.", "Tre."]


def test_a_range_that_another_program_wrote_wrong_loses_no_row(tmp_path):
    import zipfile

    book = openpyxl.Workbook()
    book.active.title = "Forside"
    data = book.create_sheet("Data")
    for line in [("spørgsmål", "svar"), *((f"q{n}", f"p{n}") for n in range(9))]:
        data.append(line)
    book.create_sheet("Skjult").sheet_state = "hidden"
    book.save(tmp_path / "right.xlsx")
    with zipfile.ZipFile(tmp_path / "right.xlsx") as old, zipfile.ZipFile(tmp_path / "a.xlsx", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b'ref="A1:B10"', b'ref="A1"'))
    found, reading = pairs(Source(str(tmp_path / "a.xlsx")))
    assert len(found) == 9 and "only its sheet 'Data' is read, not Forside, Skjult" in reading.notes[0]


def test_rows_that_are_all_skipped_are_none_again_and_again(tmp_path, write_jsonl):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": " "}, {"text": ""}])
    for _ in range(3):
        with pytest.raises(UserError, match="the data set is empty"):
            open_rows([Source(path, skip_empty=True)], "documents")


def test_a_letter_that_was_cut_in_half_garbles_no_other(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("Rødgrød med fløde.\n".encode() + "Blåbærgrød på øen, blå".encode()[:-1] + b"\n")
    reading = Reading()
    rows = [row["text"] for _, several in read_source(Source(str(path)), "documents", reading) for row in several]
    assert rows == ["Rødgrød med fløde.", "Blåbærgrød på øen, bl\ufffd"]
    assert reading.sentences("a")[-1] == f"{path}: not valid UTF-8, read as UTF-8 with damaged letters (1 line)"


def test_a_quote_that_is_never_closed_counts_all_that_it_takes(tmp_path):
    path = tmp_path / "a.csv"
    rows = [f"q{n};p{n}\n" for n in range(40)]
    path.write_text("query;positive\n" + "".join(rows[:5]) + '"q;p\n' + "".join(rows))
    with pytest.raises(UserError, match=r"41 of 46 rows cannot be read; the first: .*line 7: a quote is opened here"):
        open_rows([Source(str(path), skip_bad=True)], "pairs")


def test_a_list_in_the_only_row_of_a_json_file_is_no_list_of_rows(tmp_path):
    (tmp_path / "a.json").write_text('{"query": "Hvad?", "positive": "Det.", "negatives": ["Nej.", "Jo."]}')
    assert open_rows([Source(str(tmp_path / "a.json"))], "pairs")["negatives"][:] == [["Nej.", "Jo."]]


def test_json_nested_too_deeply_is_one_sentence(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "Hej"}\n' + "[" * 100_000 + "\n")
    assert "line 2: JSON nested too deeply" in refused(Source(str(tmp_path / "a.jsonl")), "documents")


def test_files_that_are_left_out_are_named_with_what_to_do(tmp_path):
    put(tmp_path, "a.csv")
    for name in ("brev.docx", "gammel.xls", "~$a.xlsx", "logo.png"):
        (tmp_path / name).write_bytes(b"x")
    _, reading = pairs(Source(str(tmp_path)))
    assert reading.notes[0] == (
        f"{tmp_path}: files of other types are not read: brev.docx, gammel.xls, logo.png (.docx: save it as .txt, .xls: save it "
        "as .xlsx)"
    )
    assert len(pairs(Source(str(tmp_path / "*")))[0]) == len(ROWS), (
        "an open workbook's lock is no workbook, for a glob either"
    )
