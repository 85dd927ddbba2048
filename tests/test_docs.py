"""Every page is reachable, every link leads somewhere, and lists of things are complete. `make docs` builds the site."""

import importlib
import re
import sys
import tomllib

import pytest
from support.documents import ROOT, anchors, links, reachable

import l2v_kernels
from l2v.recipe import OBJECTIVES, Base, Lora, Recipe, Source, Template, Tracking, Zero

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
READMES = [*sorted(ROOT.glob("*.md")), ROOT / "benchmarks" / "README.md", ROOT / "kernels" / "README.md"]


def test_every_page_is_reachable_from_the_index():
    missing = set(PAGES) - reachable(DOCS / "index.md", DOCS)
    assert not missing, f"no link leads to {[str(page.relative_to(ROOT)) for page in sorted(missing)]}"


@pytest.mark.parametrize("page", [*READMES, *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
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
    assert set(rows) == known


@pytest.fixture
def site(monkeypatch):
    """The scripts that assemble the site's pages."""
    monkeypatch.syspath_prepend(DOCS / "site")
    yield importlib.import_module("make_site")
    for name in ("make_site", "recipe_keys"):
        sys.modules.pop(name, None)


def test_the_site_has_every_page_and_its_links_stay_inside(site, tmp_path):
    written = site.assemble(tmp_path / "site")
    assert {(tmp_path / "site" / page.relative_to(DOCS)) for page in PAGES} <= set(written)
    for page in (page for page in written if page.suffix == ".md"):
        for target, _ in links(page):
            assert target.is_file() and target.is_relative_to(tmp_path / "site"), f"{page}: {target}"


def test_a_link_that_leads_nowhere_stops_the_site(site, tmp_path, monkeypatch):
    monkeypatch.setattr(site, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(site, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[a page](absent.md)\n")
    with pytest.raises(SystemExit, match=r"docs/index.md: the link absent.md leads nowhere"):
        site.assemble(tmp_path / "site")


def test_the_menu_names_the_pages_written_by_hand():
    menu = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]))
    assert {str(page.relative_to(DOCS)) for page in PAGES if DOCS / "results" not in page.parents} <= menu


def test_every_recipe_key_is_explained(site):
    tables = site.recipe_keys.tables()
    rows = re.findall(r"^\| `(\w+)` \| .+ \| .+ \| (.+) \|$", tables, flags=re.MULTILINE)
    assert all(meaning.strip() for _, meaning in rows)
    kinds = (Recipe, Base, Template, Lora, Zero, Tracking, Source, *OBJECTIVES.values())
    fields = {name.rstrip("_") for kind in kinds for name in kind.__dataclass_fields__}
    assert {key for key, _ in rows} == fields | {"extends"}


def test_every_kernel_is_in_the_reference(site):
    headings = re.findall(r"heading: l2v_kernels\.(\w+)$", site.kernels(), flags=re.MULTILINE)
    assert headings == l2v_kernels.__all__
