"""`l2v report`: the page parses, fetches nothing, escapes what it is told, and its numbers are the files' numbers."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from support.made_run import make_run, write_results

from l2v.commands import main as cli
from l2v.evaluation.published import published
from l2v.evaluation.seb import SEB_DA

VOID = {"meta", "br", "hr", "img", "link", "input", "use", "path", "stop"}


class Page(HTMLParser):
    """Every tag closed; tables by caption as rows of texts; what would be fetched; headings; pictures' texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tables, self.fetched, self.links, self.headings, self.alts = [], {}, [], [], [], []
        self.ids, self.row, self.words = [], None, ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in found:
            self.ids.append(found["id"])
        for key in ("src", "href", "xlink:href", "data", "poster", "srcset", "action"):
            if found.get(key):
                (self.links if tag == "a" else self.fetched).append(found[key])
        if tag == "table":
            self.tables[found["aria-label"]] = self.now = []
        if tag == "tr":
            self.now.append([])
        if found.get("role") == "img":
            self.alts.append(found["aria-label"])
        self.words = ""

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data):
        self.words += data

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.now[-1].append(self.words)
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_recipe):
    folder = tmp_path_factory.mktemp("report")
    recipe = tiny_recipe(folder, name="tiny <b>&")
    run = make_run(recipe)
    write_results(run)
    return run


@pytest.fixture(scope="module")
def page(run) -> str:
    assert cli.main(["report", str(run), "--out", str(run / "out.html")]) == 0
    return (run / "out.html").read_text(encoding="utf-8")


def test_it_parses_and_fetches_nothing(page):
    found = Page(page)
    assert all(link.startswith("#") for link in found.fetched), found.fetched
    assert all(link.startswith("#") and link[1:] in found.ids for link in found.links)
    assert len(found.ids) == len(set(found.ids))
    assert "<script" not in page and "@import" not in page and "<link" not in page
    assert not re.search(r"url\((?!#)", page)
    assert found.headings[0] == 1 and max(np.diff(found.headings)) <= 1
    assert "<b>&" not in page.replace("&lt;b&gt;&amp;", "") and "tiny &lt;b&gt;&amp;" in page
    assert "X&lt;1&gt;: its data is not on this machine" in page


def test_its_numbers_are_those_of_the_files(page, run):
    tables = {name.split(":")[0].split(",")[0]: rows for name, rows in Page(page).tables.items()}
    assert tables["Throughput"] == [
        ["Stage", "Steps", "Tokens", "Tokens/s", "MFU, of measured", "Peak memory, GiB"],
        ["mntp", "3", "3,000", "200.0", "30.0%", "2.25"],
        ["simcse", "", "", "", "", ""],
        ["supervised", "3", "3,000", "200.0", "30.0%", "2.25"],
    ]
    results = json.loads((run / "eval" / "results.json").read_text(encoding="utf-8"))
    own = results["rows"][1]["scores"]
    [table] = [rows for name, rows in Page(page).tables.items() if name.startswith("The twelve")]
    heads, rows = table[0], table[1:]
    assert heads == ["Rank", "Model", "Size", "Width", "Mean", *(task.column for task in SEB_DA)]
    [mine] = [row for row in rows if row[5] == f"{100 * own[SEB_DA[0].name]['score']:.2f}"]
    assert mine[5:] == [f"{100 * own[task.name]['score']:.2f}" for task in SEB_DA]
    mean = 100 * np.mean([own[task.name]["score"] for task in SEB_DA])
    assert mine[4] == f"{mean:.2f}"
    others = published()
    assert mine[0] == str(1 + sum(row.mean is not None and row.mean > mean for row in others))
    means = [row[4] for row in rows]
    for known in others:
        if known.mean is not None:
            assert f"{known.mean:.2f}" in means
    assert "68.42" in means and "60.10" in means  # the best Danish LLM2Vec model, and the poster's own average
    assert len(rows) == len(others) + 2 + 4
    [sample] = [rows for name, rows in Page(page).tables.items() if "Local benchmark" in name]
    assert sample[1:] == [["TF-IDF (characters)", "15.50"], ["tiny/run", "31.00"]]
    [lineage] = [rows for name, rows in Page(page).tables.items() if name.startswith("Lineage")]
    written = json.loads((run / "supervised" / "adapter" / "lineage.json").read_text(encoding="utf-8"))
    assert lineage[-1][2] == f"mntp {written['merged'][0]['sha256'][:12]}"
    assert lineage[-1][4] == written["adapter"]["sha256"][:12]


def test_curves_and_map_are_described_and_drawn(page):
    alts = Page(page).alts
    assert len(alts) == 5 and page.count("<svg") == 5
    assert "from 8.250 at step 1 to 6.125 at step 3; held-out loss from 8.500 to 5.500" in alts[0]
    assert "held-out nDCG@10 from 0.250 at step 0 to 0.750 at step 3" in alts[1]
    assert "420 texts of 28 topics" in alts[4] and "by chance: 3.3%" in alts[4]
    assert "currentColor" in page and "#222222" not in page  # ink is the page's, in light and in dark


def test_what_is_missing_is_a_sentence(page):
    assert "Stage simcse is not trained yet" in page
    assert "No all-MiniLM-L6 row" in page and "No TF-IDF row" not in page


def test_markdown_says_the_same(page, run):
    text = (run / "out.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(pictures) == 5 and all((run / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)
    for rows in Page(page).tables.values():
        for cell in rows[-1]:
            assert cell.replace("<", "&lt;") in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["stages"]["mntp"]["lr"] == 5e-3 and recipe["name"] == "tiny <b>&"


def test_a_run_that_has_only_begun(tmp_path, run, capsys, monkeypatch):
    import shutil

    import l2v.evaluation.published as module
    from l2v.errors import UserError

    def nothing(*_):
        raise UserError("the published results are not installed")

    monkeypatch.setattr(module, "published", nothing)
    begun = tmp_path / "begun"
    shutil.copytree(run / "mntp", begun / "mntp", ignore=shutil.ignore_patterns("adapter"))
    with open(begun / "mntp" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    assert cli.main(["report", str(begun)]) == 0
    text = (begun / "report.html").read_text(encoding="utf-8")
    for said in (
        "Stage mntp is not finished",
        "No evaluation yet",
        "No map: no stage is trained yet",
        "published results are not",
    ):
        assert said in text, said
    Page(text)


def test_map_of_a_file(tmp_path, run, write_jsonl, sentences):
    rows = [{"tekst": text, "emne": ("dyr", "folk")[at % 2]} for at, text in enumerate(sentences[:24])]
    file = write_jsonl(tmp_path / "emner.jsonl", rows)
    out = tmp_path / "m.html"
    assert cli.main(["report", str(run), "--map", file, "--text", "tekst", "--label", "emne", "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "map of 24 texts of 2 topics" in text and "PCA of emner.jsonl, by emne" in text


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nowhere"], 1, "not a run of l2v"),
        (["{run}", "--map", "x.jsonl"], 2, "--map FILE and --label COLUMN must be given together"),
        (["{run}", "--out", "page.pdf"], 2, "the page must be a .html file"),
    ],
)
def test_mistakes_are_sentences(arguments, code, says, run, capsys):
    assert cli.main(["report", *(a.format(run=run) for a in arguments)]) == code
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_damaged_file_is_named(tmp_path, run, capsys):
    import shutil

    bad = tmp_path / "bad"
    shutil.copytree(run, bad)
    (bad / "eval" / "results.json").write_text("{", encoding="utf-8")
    assert cli.main(["report", str(bad), "--no-map"]) == 1
    assert "results.json: cannot be read" in capsys.readouterr().err
    (bad / "eval" / "results.json").unlink()
    (bad / "mntp" / "metrics.jsonl").write_text('{"step": 1}\nx\n{"step": 2}\n', encoding="utf-8")
    assert cli.main(["report", str(bad), "--no-map"]) == 1
    assert "metrics.jsonl:2: not JSON" in capsys.readouterr().err
