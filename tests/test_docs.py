"""Every page is reachable, every link leads somewhere, and lists of things are complete."""

import importlib
import re
import tomllib

import pytest
from support.documents import ROOT, anchors, links, reachable

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def test_every_page_is_reachable_from_the_index():
    missing = set(PAGES) - reachable(DOCS / "index.md", DOCS)
    assert not missing, f"no link leads to {[str(page.relative_to(ROOT)) for page in sorted(missing)]}"


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target, anchor in links(page):
        assert target.exists(), f"{target} does not exist"
        assert target.is_relative_to(ROOT), f"{target} lies outside the repository"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{target} has no heading #{anchor}"


def test_every_command_has_a_row():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = set(importlib.import_module(project["scripts"]["l2v"].partition(":")[0]).COMMANDS)
    rows = re.findall(r"^\| `l2v (\w+)", (DOCS / "command-line.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(rows) == known | {"init"}
