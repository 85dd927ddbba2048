import re

import pytest
import yaml
from support.build_cases import FILES, configure, danish, rows, source, write_lines

from l2v.commands import main as cli
from l2v.data.corpus.config import Build, config_folder, load_config
from l2v.errors import RecipeError
from l2v.recipe.load import to_dict

SHIPPED = sorted(path.stem for path in config_folder().glob("*.yaml"))

GOOD = """\
name: prøve
kind: pairs
sources:
  - path: a.jsonl
    licence: cc0-1.0
    columns: {query: titel}
language: {keep: [da], among: [da, sv]}
length:
  query: [1, 50]
near: {threshold: 0.9}
splits: {train: 0.9, dev: 0.1}
"""


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_load_and_name_provenance(name):
    config = load_config(name)
    assert config.name == name
    for one in config.sources:
        assert one.licence and (one.origin or one.path.startswith("hub:") or one.label)


def test_the_seven_sources_of_the_danish_work_are_named_with_their_counts():
    config = load_config("supervised-da")
    assert len(config.sources) == 7 and 93_000 < sum(s.published_rows for s in config.sources) < 96_000


def test_every_key_is_explained_in_debian_da():
    text = (config_folder() / "debian-da.yaml").read_text(encoding="utf-8")
    tree = to_dict(load_config("debian-da"))
    keys = {*tree, *tree["sources"][0], *tree["language"], *tree["near"], *tree["decontaminate"], *tree["length"]}
    elsewhere = {"sentences"}  # of another kind: wiki-da.yaml
    for key in keys - elsewhere:
        assert re.search(rf"^[ #{{-]*{key}:.*#|^ *{key}:", text, re.M), key


def test_overrides_reach_lists_and_make_mappings(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(GOOD, encoding="utf-8")
    config = load_config(str(path), ["sources.0.limit=7", "near=null", "decontaminate.ngram=8", "folder=x"])
    assert (config.sources[0].limit, config.near, config.decontaminate.ngram, config.folder) == (7, None, 8, "x")
    assert isinstance(config, Build) and config.length.text == (5, 1_000_000)


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("kind: pairs", "kind: pars", 2, "kind is 'pars'; choose one of documents, sentences, pairs"),
        ("kind: pairs", "kinds: pairs", 2, "unknown key 'kinds'; did you mean 'kind'?"),
        ("    licence: cc0-1.0\n", "", 4, "the key 'sources[0].licence' is missing"),
        ("[1, 50]", "[1]", 9, "length.query is a list of 2 numbers; found a list"),
        ("threshold: 0.9", "threshold: meget", 10, "near.threshold is a number; found 'meget'"),
        ("[1, 50]", "[9, 5]", None, "length.query is [9, 5]; give least and most words"),
        ("threshold: 0.9", "threshold: 2", None, "near.threshold is 2; use 0 to 1"),
        ("dev: 0.1", "dev: 0.2", None, "splits add up to 1.1 and must add up to 1"),
        ("{query: titel}", "{titel: query}", None, "columns.titel is not a field of a row; choose among id, text"),
        ("[da, sv]", "[da, nb]", None, "the language filter does not support 'nb'; it supports da, no, nn"),
        ("a.jsonl", "a.jsonl\n    markup: wiki40b", None, "wiki markup gives documents or sentences, not pairs"),
        ("a.jsonl", "a.jsonl\n    take: translation\n    format: debian", None, "needs kind: pairs and `english`"),
        ("a.jsonl", "a.jsonl\n    packages: [p]", None, "packages and english need format: debian"),
    ],
)  # fmt: skip
def test_a_mistake_is_a_sentence_with_its_line(tmp_path, old, new, line, says):
    path = tmp_path / "a.yaml"
    path.write_text(GOOD.replace(old, new), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_config(str(path))
    message = str(caught.value)
    assert says in message and "\n" not in message
    assert message.startswith(f"{path}:{line}:" if line else f"{path}:")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["ingen"], "no data configuration 'ingen': give a YAML file or one of debian-da"),
        (["debian-da", "sources.9.limit=1"], "sources is a list of 2; use a number from 0 in place of '9'"),
        (["debian-da", "limit"], "an override has the form key=value, for example folder=my/files"),
        (["debian-da", "--workers", "0"], "--workers is 0 and must be at least 1"),
    ],
)
def test_a_mistake_on_the_command_line(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "build", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, capsys):
    (tmp_path / "a").write_text("en fil")
    write_lines(tmp_path / "a.jsonl", [{"text": danish(0)}])
    config = configure(tmp_path, "documents", [source("a.jsonl")])
    assert cli.main(["data", "build", str(config), "--out", str(tmp_path / "a" / "b")]) == 1
    error = capsys.readouterr().err
    assert "a/b: cannot be read or written: Not a directory; fix that" in error and "Traceback" not in error


def test_the_command_builds_into_data_and_says_what_it_could_not_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", [{"text": danish(i)} for i in range(5)])
    (tmp_path / "dump.xml").write_bytes((FILES / "dump.xml").read_bytes())
    sources = [source("a.jsonl"), source("dump.xml"), source("b.jsonl")]
    config = configure(tmp_path, "documents", sources, near=None, language=None, exact=False)
    tree = yaml.safe_load(config.read_text(encoding="utf-8"))
    config.write_text(yaml.safe_dump({k: v for k, v in tree.items() if k != "folder"}), encoding="utf-8")
    assert cli.main(["data", "build", "build.yaml", "--workers", "1"]) == 1
    said = capsys.readouterr()
    assert "l2v: incomplete source: b.jsonl: file not found" in said.err
    assert "redirect" in said.out and len(rows(tmp_path / "data" / "prøve")) == 6
    (tmp_path / "b.jsonl").write_text('{"text": "Den sidste tekst er kommet til nu."}\n', encoding="utf-8")
    assert cli.main(["data", "build", "build.yaml", "--workers", "1"]) == 0
    assert len(rows(tmp_path / "data" / "prøve")) == 7
    assert cli.main(["data", "build", "build.yaml", "--workers", "1"]) == 0
    assert "is already built" in capsys.readouterr().out
