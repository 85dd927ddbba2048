"""`l2v report`: the page parses, fetches nothing, escapes its input, and its numbers are the files' numbers."""

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
    assert len(alts) == 6 and page.count("<svg") == 6
    assert "sts, in percent, of 2 rows; the best is tiny/run with 31.00" in alts[0]
    assert "from 8.250 at step 1 to 6.125 at step 3; held-out loss from 8.500 to 5.500" in alts[1]
    assert "held-out nDCG@10 from 0.250 at step 0 to 0.750 at step 3" in alts[2]
    assert "24 queries and their answers" in alts[5] and "by chance: 4.2%" in alts[5]
    assert "currentColor" in page and "#222222" not in page  # ink is the page's, in light and in dark


def test_what_is_missing_is_a_sentence(page):
    assert "Stage simcse is not trained yet" in page
    assert "No all-MiniLM-L6 row" in page and "No TF-IDF row" not in page


def test_markdown_says_the_same(page, run):
    text = (run / "out.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(pictures) == 6 and all((run / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)
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


def rows_of(*scored, task="mine-faq", kind="Retrieval", metric="ndcg_at_10"):
    """Rows of results.json on one task: (name, identity, score, low, high)."""
    found = []
    for name, identity, score, low, high in scored:
        entry = {"score": score, "cells": {"test/default": score}, "metric": metric, "type": kind, "revision": "r"}
        entry |= {"seconds": 1.0, "cached": False} | ({"low": low, "high": high, "queries": 90} if low else {})
        found.append({"name": name, "identity": identity, "scores": {task: entry}, "failed": {}, "empty_texts": 0})
    return found


def test_own_scores_come_first_with_intervals_and_a_word_on_tfidf(tmp_path, run):
    import shutil

    own = tmp_path / "own"
    shutil.copytree(run, own)
    rows = rows_of(
        ("TF-IDF (characters)", {"baseline": "tfidf"}, 0.71, 0.61, 0.8),
        ("mntp", {"merged": []}, 0.3, 0.2, 0.4),
        ("supervised", {"merged": []}, 0.69, 0.6, 0.79),
    )
    compared = [
        {"better": "TF-IDF (characters)", "than": "supervised", "difference": 0.02, "low": -0.03, "high": 0.07},
        {"better": "TF-IDF (characters)", "than": "mntp", "difference": 0.41, "low": 0.3, "high": 0.5},
    ]
    facts = {"tasks": ["mine-faq"], "rows": rows, "local": ["mine"], "notes": [], "comparisons": {"mine-faq": compared}}
    (own / "eval" / "results.json").write_text(json.dumps(facts), encoding="utf-8")
    assert cli.main(["report", str(own), "--no-map"]) == 0
    text = (own / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    first, *_ = found.tables
    assert first == "Local benchmark “mine”, in percent"
    assert found.tables[first][1] == ["TF-IDF (characters)", "71.00 (61.00 to 80.00)"]
    assert text.count('<strong class="best">') == 1 and '<strong class="best">71.00 (61.00 to 80.00)</strong>' in text
    assert "TF-IDF, which compares words, scores higher: faq 71.00 against 69.00 of supervised." in text
    assert (
        "faq: TF-IDF (characters) is 2.00 above supervised (paired bootstrap, 95%: -3.00 to +7.00); the difference may be chance."
        in text
    )
    assert "95%: +30.00 to +50.00)." in text
    assert text.index("Scores on your data") < text.index("Scandinavian Embedding Benchmark") < text.index("Training")
    markdown = (own / "report.md").read_text(encoding="utf-8")
    assert "| TF-IDF (characters) | **71.00 (61.00 to 80.00)** |" in markdown


def test_a_run_without_own_scores_says_how_to_get_them(tmp_path, run):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(run, bare)
    (bare / "eval" / "results.json").unlink()
    assert cli.main(["report", str(bare), "--no-map"]) == 0
    text = (bare / "report.html").read_text(encoding="utf-8")
    assert f"l2v eval {bare} --stages --baselines tfidf --benchmark local:FOLDER computes them" in text


def contrast(first: str, second: str) -> float:
    """WCAG 2.2's ratio of two colours."""

    def light(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((light(first), light(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_seen_on_the_light_and_on_the_dark_page(page):
    from l2v.report.pictures import MAX_COLORS, OTHER, POINTS, TOKENS

    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", text)) for text in page.split("@media (prefers")[:2])
    names = {token.removeprefix("var(--").rstrip(")") for token in TOKENS.values()} - {"currentColor"}
    for theme in (light, dark):
        assert len({theme[name] for name in names}) == len(names)
        assert all(contrast(theme[name], theme["paper"]) >= 3 for name in names)
        assert contrast(theme["ink"], theme["paper"]) >= 7 and contrast(theme["soft"], theme["paper"]) >= 4.5
    assert all(contrast(color, "#ffffff") >= 3 for color in TOKENS)  # the PNG next to the Markdown
    assert len(POINTS) == MAX_COLORS == len({*POINTS}) and OTHER not in POINTS


def test_a_map_has_at_most_ten_colours_and_danish_letters():
    from l2v.report import own
    from l2v.report.pictures import map_picture
    from l2v.report.space import Map

    texts = own.of_sample()
    assert {"børn", "håndværk", "økonomi"} <= {*texts.labels} and not {"boern", "oekonomi"} & {*texts.labels}
    generator = np.random.default_rng(0)
    few = own.Texts(["a"] * 12, ["blå", "grøn", "rød"] * 4, "x")
    for chosen, legend in ((texts, "19 other topics"), (few, "grøn")):
        places = generator.normal(size=(len(chosen.texts), 2))
        drawn = map_picture("r", Map(chosen, places, "PCA", "")).svg()
        colors = set(re.findall(r"var\(--\w+\)", drawn))
        assert len(colors) == min(10, len({*chosen.labels})) and legend in drawn


def test_a_map_shows_the_runs_own_texts(tmp_path, run, write_jsonl, sentences):
    from l2v.report import own
    from l2v.runs.facts import read_run

    facts = read_run(run)
    held = write_jsonl(tmp_path / "egne-1.jsonl", [{"spørgsmål": f"Hvem? {s}", "svar": s} for s in sentences[:40]])
    write_jsonl(tmp_path / "egne-2.jsonl", [{"spørgsmål": s, "svar": s} for s in sentences[40:50]])
    facts.last.recipe["eval_data"] = [{"path": str(tmp_path / "egne-*.jsonl"), "task": "question-da"}]
    found = own.of_run(facts)
    assert found.pairs and found.labels == ["spørgsmål"] * 50 + ["svar"] * 50
    assert found.texts[50:90] == sentences[:40] and found.source == "held-out pairs of egne-*.jsonl"
    assert found.instructions == ("Find den tekst, der besvarer spørgsmålet:", None)
    facts.last.recipe["eval_data"] = [{"path": held, "limit": 5}]
    assert len(own.of_run(facts).texts) == 10
    facts.last.recipe["eval_data"] = [{"path": str(tmp_path / "gone.jsonl")}]
    assert own.of_run(facts).source == "training pairs of pairs.jsonl"  # those of the stage
    facts.last.recipe["data"] = [{"path": "hub:some/pairs"}]
    said = own.of_run(facts).source
    assert said.startswith("the passages of the Danish sample") and "gone.jsonl: file not found" in said
    assert own.of_run(facts, sample=True).source == "the passages of the Danish sample, by subject"


def test_the_number_below_a_map_is_that_of_all_dimensions():
    from l2v.report.space import answers_found, topics_kept

    vectors = np.eye(4, dtype=np.float32)
    pairs = np.concatenate([vectors, vectors[[0, 1, 3, 2]]])
    assert answers_found(pairs, [*"abcd", *"ABCD"]).startswith("50.0% of the queries have their own answer")
    assert answers_found(pairs, [*"abcd", *"ABCC"]).startswith("100.0%")  # an equal text is the same answer
    said = topics_kept(np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], dtype=np.float32), ["x", "x", "y", "y"])
    assert said.startswith("100.0% of the texts") and "by chance: 33.3%" in said
