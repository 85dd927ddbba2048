import bz2
import gzip
import json
import lzma

import datasets
import pytest
from support.build_cases import FILES, configure, danish, make, rows, source, write_lines

from l2v.data.corpus import markup
from l2v.errors import UserError

PARAGRAPHS = [
    "En bøgeskov er en skov, hvor bøgen er det vigtigste træ. Den findes bl.a. på Sjælland og Fyn.",
    "I maj springer bøgen ud – det sker ca. den 5. maj.",
    "Under træerne vokser anemoner, og der er mange fugle.",
    "Karl Johan-svampen vokser her. Læs mere hos Naturstyrelsen.",
    "Sidste afsnit om skoven.",
]


@pytest.mark.parametrize(("suffix", "squeeze"), [("", bytes), (".bz2", bz2.compress), (".gz", gzip.compress)])
def test_a_mediawiki_dump_parses_to_clean_paragraphs(tmp_path, suffix, squeeze):
    (tmp_path / f"dump.xml{suffix}").write_bytes(squeeze((FILES / "dump.xml").read_bytes()))
    report = make(configure(tmp_path, "documents", [source(f"dump.xml{suffix}")], near=None), tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert row["text"].split("\n") == PARAGRAPHS
    assert (row["id"], row["document"], row["licence"]) == (f"dump.xml{suffix}/101", "Bøgeskov", "cc0-1.0")
    assert report["dropped"] == {"redirect": 1, "namespace": 1, "empty": 1} and report["records"] == 4


def test_sentences_of_a_dump(tmp_path):
    (tmp_path / "dump.xml").write_bytes((FILES / "dump.xml").read_bytes())
    config = configure(tmp_path, "sentences", [source("dump.xml")], near=None, sentences={"least": 4, "most": 100})
    report = make(config, tmp_path / "out")
    assert [row["text"] for row in rows(tmp_path / "out")][:3] == [
        "En bøgeskov er en skov, hvor bøgen er det vigtigste træ.",
        "Den findes bl.a. på Sjælland og Fyn.",
        "I maj springer bøgen ud – det sker ca. den 5. maj.",
    ]
    assert report["made"] == 7 and {row["document"] for row in rows(tmp_path / "out")} == {"Bøgeskov"}


def test_a_dump_that_breaks_off_keeps_what_stood_before(tmp_path):
    whole = (FILES / "dump.xml").read_bytes()
    (tmp_path / "dump.xml").write_bytes(whole[: whole.index(b"</page>") + 20])
    report = make(configure(tmp_path, "documents", [source("dump.xml")]), tmp_path / "out")
    assert report["splits"] == {"train": 1}
    assert "dump.xml: not a MediaWiki dump from here on" in report["sources"][0]["error"]


@pytest.mark.parametrize(
    ("text", "paragraphs"),
    [
        ("_START_ARTICLE_\nSkagen\n_START_PARAGRAPH_\nSkagen er en by._NEWLINE_Den ligger nordligst.",
         ["Skagen er en by.", "Den ligger nordligst."]),
        ("\n_START_ARTICLE_\nSkagen\n\n_START_SECTION_\nHistorie\n\n_START_PARAGRAPH_\nByen er gammel.\n", ["Byen er gammel."]),
        ("_START_ARTICLE_\nA\n_START_SECTION_\nTomt afsnit\n_START_SECTION_\nNæste\n_START_PARAGRAPH_\nTekst.", ["Tekst."]),
        ("Uden mærker.\nTo linjer.", ["Uden mærker.", "To linjer."]),
    ],
)  # fmt: skip
def test_wiki40b_markers(text, paragraphs):
    assert markup.wiki40b(text) == paragraphs


def test_a_wiki40b_source_names_its_articles(tmp_path):
    text = f"_START_ARTICLE_\nSkagen\n_START_SECTION_\nHistorie\n_START_PARAGRAPH_\n{danish(1)}_NEWLINE_{danish(2)}"
    write_lines(tmp_path / "w.jsonl", [{"text": text}])
    make(configure(tmp_path, "documents", [source("w.jsonl", markup="wiki40b")]), tmp_path / "out")
    (row,) = rows(tmp_path / "out")
    assert row["text"] == f"{danish(1)}\n{danish(2)}" and row["document"] == "Skagen"


TRANSLATION = """Package: 0ad-data
Description-md5: aaaaaaaaaaaaaaaa
Description-da: Realtids strategispil - data
 Spillet foregår i oldtiden og
 kan spilles af flere.
 .
 Pakken indeholder:
  * billeder og lyde

Package: vim
Description-md5: bbbbbbbbbbbbbbbb
Description-da: Udvidet redigeringsprogram
 Vim er en ny udgave af det gamle program vi.

Package: itu
Description-md5: cccc
"""
ENGLISH = """Package: vim
Description-md5: bbbbbbbbbbbbbbbb
Description-en: Enhanced editor
 Vim is a new version of the old editor vi.
"""
PACKAGES = """Package: 0ad-data
Source: 0ad (0.0.26)
Section: games
Description: Real-time strategy game - data
Description-md5: aaaaaaaaaaaaaaaa

Package: vim
Section: contrib/editors
Description: Enhanced editor
Description-md5: bbbbbbbbbbbbbbbb
"""


@pytest.fixture
def debian(tmp_path):
    (tmp_path / "Translation-da.bz2").write_bytes(bz2.compress(TRANSLATION.encode()))
    (tmp_path / "Translation-en.gz").write_bytes(gzip.compress(ENGLISH.encode()))
    (tmp_path / "Packages.xz").write_bytes(lzma.compress(PACKAGES.encode()))
    return tmp_path


def test_debian_titles_and_descriptions(debian):
    index = source("Translation-da.bz2", format="debian", packages=["Packages.xz"])
    report = make(configure(debian, "pairs", [index]), debian / "out")
    first, second = rows(debian / "out")
    assert first["query"] == "Realtids strategispil - data"
    assert first["positive"] == (
        "Spillet foregår i oldtiden og kan spilles af flere. Pakken indeholder: * billeder og lyde"
    )
    assert (first["group"], first["section"], first["document"]) == ("0ad", "games", "0ad-data")
    assert (second["group"], second["section"]) == ("vim", "editors")
    assert report["dropped"] == {"malformed": 1}
    assert "line 15: the field 'description-da' is absent" in report["sources"][0]["examples"]["malformed"][0][1]


def test_debian_translations_and_documents(debian):
    keys = {"format": "debian", "packages": ["Packages.xz"]}
    both = source(
        "Translation-da.bz2", take="translation", english=["Translation-en.gz"], languages=["da", "en"], **keys
    )
    report = make(configure(debian, "pairs", [both]), debian / "pairs")
    (row,) = rows(debian / "pairs")
    assert row["query"] == "Vim er en ny udgave af det gamle program vi."
    assert row["positive"] == "Vim is a new version of the old editor vi." and row["lang"] == "en"
    assert report["dropped"] == {"malformed": 1, "empty positive": 1}
    make(configure(debian, "documents", [source("Translation-da.bz2", **keys)]), debian / "documents")
    assert [r["text"] for r in rows(debian / "documents")][1] == (
        "Udvidet redigeringsprogram.\nVim er en ny udgave af det gamle program vi."
    )


def test_columns_of_csv_parquet_jsonl_and_the_hubs_loader(tmp_path):
    pairs = [{"titel": f"Overskrift nummer {i}", "tekst": danish(i), "id": f"a{i}"} for i in range(8)]
    (tmp_path / "a.csv").write_text("".join(f'{p["titel"]},"{p["tekst"]}"\n' for p in [
        {"titel": "titel", "tekst": "tekst"}, *pairs[:2]]), encoding="utf-8")  # fmt: skip
    datasets.Dataset.from_list(pairs[2:4]).to_parquet(str(tmp_path / "b.parquet"))
    write_lines(tmp_path / "c.jsonl", pairs[4:6])
    (tmp_path / "hub" / "data").mkdir(parents=True)
    datasets.Dataset.from_list(pairs[6:]).to_parquet(str(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet"))
    columns = {"columns": {"query": "titel", "positive": "tekst"}}
    sources = [source(p, **columns) for p in ("a.csv", "b.parquet", "c.jsonl")]
    sources.append(source(f"hub:{tmp_path}/hub", label="hub", instruction="Find teksten", **columns))
    make(configure(tmp_path, "pairs", sources), tmp_path / "out")
    found = rows(tmp_path / "out")
    assert [(r["query"], r["positive"]) for r in found] == [(p["titel"], p["tekst"]) for p in pairs]
    assert [r["id"] for r in found] == [
        "a.csv/1", "a.csv/2", "b.parquet/a2", "b.parquet/a3", "c.jsonl/a4", "c.jsonl/a5", "hub/a6", "hub/a7",
    ]  # fmt: skip
    assert [r["instruction"] for r in found] == [None] * 6 + ["Find teksten"] * 2


@pytest.mark.parametrize(("name", "comma"), [("a.csv", ","), ("a.tsv", "\t")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_breaks_inside_quotes_are_part_of_the_text(tmp_path, name, comma, end):
    """Without them the words around them would run together; a blank line between rows is no row."""
    long = end.join([danish(0), danish(1), "", danish(2)])
    lines = [f"query{comma}positive", f'Hvad står her?{comma}"{long}"', "", f"Og her?{comma}{danish(3)}"]
    (tmp_path / name).write_bytes((end.join(lines) + end).encode())
    write_lines(tmp_path / "a.jsonl", [{"query": "Hvad står her?", "positive": long.replace(end, "\n")},
                                       {"query": "Og her?", "positive": danish(3)}])  # fmt: skip
    for file in (name, "a.jsonl"):
        make(configure(tmp_path, "pairs", [source(file)], near=None), tmp_path / f"out-{file}")
    found, expected = ([(r["query"], r["positive"]) for r in rows(tmp_path / f"out-{f}")] for f in (name, "a.jsonl"))
    assert found == expected and len(found) == 2 and f"{danish(0)} {danish(1)}" in found[0][1]


def test_malformed_rows_are_counted_and_the_rest_goes_on(tmp_path):
    lines = [
        {"text": danish(0)}, '{"text": "afbrudt', "[1, 2]", {"tekst": "forkert felt"}, {"text": 7},
        {"text": None}, {"text": "  "}, {"text": danish(1)},
    ]  # fmt: skip
    write_lines(tmp_path / "a.jsonl", lines)
    report = make(configure(tmp_path, "documents", [source("a.jsonl")]), tmp_path / "out")
    assert [r["text"] for r in rows(tmp_path / "out")] == [danish(0), danish(1)]
    assert report["records"] == 8 and report["dropped"] == {"malformed": 4, "empty": 2}
    assert [text for _, text in report["sources"][0]["examples"]["malformed"]] == [
        "a.jsonl, line 2: malformed JSON (Unterminated string starting at at column 10); each line is one object",
        "a.jsonl, line 3: each line is one JSON object; found list",
        "a.jsonl, line 4: the field 'text' is absent; found tekst",
    ]


def test_mixed_encodings_are_read_repaired_or_counted(tmp_path):
    text = "Blåbærgrød spises på øen hver eneste sommer af alle de gamle søfolk."
    windows = json.dumps({"text": text + " Først."}, ensure_ascii=False).encode("windows-1252")
    garbled = {"text": (text + " Dernæst.").encode().decode("windows-1252")}
    broken = b'{"text": "\x81\xb1\xb2\xb1\xb2"}'
    write_lines(tmp_path / "a.jsonl", [{"text": text}, windows, garbled, broken])
    (tmp_path / "b.csv").write_bytes(b"id,text\n1," + (text + " Til sidst.").encode("windows-1252") + b"\n")
    report = make(configure(tmp_path, "documents", [source("a.jsonl"), source("b.csv")], near=None), tmp_path / "out")
    assert [r["text"] for r in rows(tmp_path / "out")] == [
        text + end for end in ("", " Først.", " Dernæst.", " Til sidst.")
    ]
    assert report["dropped"] == {"encoding": 1} and report["changed"] == {"re-decoded": 2, "mojibake": 1}
    strict = make(
        configure(tmp_path, "documents", [source("a.jsonl", encoding="utf-8")], near=None), tmp_path / "strict"
    )
    assert strict["dropped"] == {"encoding": 2}


def test_utf_16_is_read_and_a_torn_archive_stops_its_source_alone(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": danish(0)}).encode("utf-16"))
    whole = gzip.compress("".join(json.dumps({"text": danish(i)}) + "\n" for i in range(3000)).encode())
    (tmp_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    write_lines(tmp_path / "c.jsonl", [{"text": danish(9000)}])
    sources = [source(p) for p in ("a.jsonl", "b.jsonl.gz", "c.jsonl", "d.jsonl")]
    report = make(configure(tmp_path, "documents", sources, near=None, exact=False), tmp_path / "out")
    errors = [s["error"] for s in report["sources"]]
    assert errors[0] is None and report["sources"][0]["kept"] == {"train": 1}
    assert errors[1].startswith("b.jsonl.gz: cannot be read to the end: ")
    assert errors[2] is None and errors[3] == "d.jsonl: file not found; did you mean 'c.jsonl'?"
    assert 100 < report["sources"][1]["kept"]["train"] < 3000 and report["sources"][2]["kept"] == {"train": 1}


def test_without_a_network_the_other_sources_are_built_and_one_sentence_says_so(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": danish(0)}])
    sources = [source("hub:nobody/nothing"), source("a.jsonl")]
    held = {"sources": [{"path": "hub:nobody/eval"}, {"path": "a.jsonl", "columns": ["intet"]}]}
    report = make(configure(tmp_path, "documents", sources, decontaminate=held), tmp_path / "out")
    (first, second) = report["sources"]
    assert (
        first["error"].startswith("hub:nobody/nothing: the Hub data set cannot be loaded: ")
        and "\n" not in first["error"]
    )
    assert second["kept"] == {"train": 1}
    assert report["evaluation_sets"][0]["error"].startswith("hub:nobody/eval: the Hub data set cannot be loaded: ")
    assert "the field 'intet' is absent" in report["evaluation_sets"][1]["error"]


def test_nothing_at_all_is_an_error(tmp_path):
    with pytest.raises(UserError, match=rf"d\.jsonl: file not found; relative paths begin in {tmp_path}"):
        make(configure(tmp_path, "documents", [source("d.jsonl")]), tmp_path / "out")
    write_lines(tmp_path / "e.jsonl", [{"text": danish(0)}])  # with the path fixed the same folder is used
    assert make(configure(tmp_path, "documents", [source("e.jsonl")], near=None), tmp_path / "out")["splits"] == {
        "train": 1
    }


def test_pairs_are_read_as_in_training(tmp_path):
    """Scores, several answers in a list, numbered negatives, a letter that was cut in half."""
    lines = [
        {"query": "Hvad er en hund?", "positive": ["En hund er et dyr.", "En hund gør højt."], "label": 1},
        {"query": "Hvad er en kat?", "positive": "En bil har fire hjul.", "label": 0},
    ]
    write_lines(tmp_path / "a.jsonl", lines)
    (tmp_path / "b.csv").write_text(
        "query,positive,negative_1,negative_2\nHvad er en ko?,En ko giver mælk.,Et hus.,En båd.\n"
    )
    (tmp_path / "c.txt").write_bytes("query;positive\nHvad er grød?;Grød er mad på øen blå".encode()[:-1] + b"\n")
    sources = [source("a.jsonl"), source("b.csv"), source("c.txt", format="csv")]
    report = make(configure(tmp_path, "pairs", sources, near=None, language=None), tmp_path / "out")
    found = {(row["query"], row["positive"]): row["negatives"] for row in rows(tmp_path / "out")}
    assert found == {
        ("Hvad er en hund?", "En hund er et dyr."): [], ("Hvad er en hund?", "En hund gør højt."): [],
        ("Hvad er en ko?", "En ko giver mælk."): ["Et hus.", "En båd."],
    }  # fmt: skip
    assert report["dropped"] == {"encoding": 1, "not a pair": 1}
