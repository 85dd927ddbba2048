"""The published results: means from cells, the poster's known numbers, and what a damaged package says."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from support.processes import ROOT

from l2v.commands.eval import main
from l2v.errors import UserError
from l2v.evaluation.published import POSTER_PRINTED, published, size_text
from l2v.evaluation.seb import SEB_DA

TASKS = [task.name for task in SEB_DA]


@pytest.fixture(scope="module")
def rows():
    return published()


def test_means_of_54_models_are_recomputed_from_cells(rows):
    assert len(rows) == 54
    by_name = {row.model: row for row in rows}
    for name, mean, rank in [
        ("jealk/TTC-L2V-supervised-2", 68.42, 1),
        ("intfloat/multilingual-e5-large-instruct", 66.26, 2),
        ("jealk/TTC-L2V-supervised-1", 60.61, 8),
        ("KennethEnevoldsen/dfm-sentence-encoder-large-1", 53.69, 20),
        ("sentence-transformers/all-MiniLM-L6-v2", 39.01, 46),
    ]:
        assert (round(by_name[name].mean, 2), by_name[name].rank) == (mean, rank)
    for row in rows[:-1]:
        assert row.mean == pytest.approx(sum(row.scores[name] for name in TASKS) / 12)
    assert [row.rank for row in rows[:-1]] == list(range(1, 54))
    assert (rows[-1].model, rows[-1].mean, rows[-1].rank) == ("all-MiniLM-L6-v2", None, None)  # 6 of 12 cells


def test_cells_are_those_of_the_files(rows):
    best = rows[0]
    assert [round(best.scores[name], 2) for name in TASKS] == [
        67.09, 54.59, 69.00, 45.84, 38.31, 73.67, 88.61, 74.80, 78.35, 53.04, 92.79, 85.02,
    ]  # fmt: skip
    assert (best.size, best.width, best.mark) == (8_030_261_248, 4096, "Danish LLM2Vec")
    assert rows[1].size == 560_000_000 and rows[1].width == 1024 and rows[1].mark is None
    assert [size_text(n) for n in (None, 22_713_216, 7_111_000_000)] == ["", "23M", "7.1B"]
    printed = {row.model: row.printed for row in rows if row.printed}
    assert printed == POSTER_PRINTED


def test_the_committed_table_is_what_the_command_writes(tmp_path, capsys):
    assert main(["--published", "--out", str(tmp_path)]) == 0
    assert "| 1 | **jealk/TTC-L2V-supervised-2** | 8.0B | 4096 | 68.42 |" in capsys.readouterr().out
    for name in ("published.md", "published.json"):
        assert (tmp_path / name).read_text() == (ROOT / "docs" / "results" / "seb" / name).read_text()
    assert len(json.loads((tmp_path / "published.json").read_text())["rows"]) == 54


def test_a_wheel_a_folder_and_the_installed_package_give_the_same_rows(rows, tmp_path):
    import importlib.util

    installed = Path(importlib.util.find_spec("seb").submodule_search_locations[0])
    wheel = tmp_path / "seb.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in (f for part in ("cache", "registered_models") for f in (installed / part).rglob("*.*")):
            archive.write(file, Path("seb") / file.relative_to(installed))
    assert published(wheel) == rows == published(installed.parent)


def test_damaged_results_say_so(tmp_path):
    with pytest.raises(UserError, match=r"no published results in it"):
        published(tmp_path)
    file = tmp_path / "x.whl"
    file.write_text("not a zip")
    with pytest.raises(UserError, match=r"x.whl: not a wheel"):
        published(file)
    folder = tmp_path / "cache" / "a__b"
    folder.mkdir(parents=True)
    (folder / "LCC.json").write_text('{"scores": {"da": {}}}')
    with pytest.raises(UserError, match=r"cache/a__b/LCC.json is damaged \(no accuracy for Danish\)"):
        published(tmp_path)
    shutil.rmtree(folder)
