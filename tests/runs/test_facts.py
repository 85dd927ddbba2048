"""What a run's facts say about its data: the rows of the files that a source names, not of the whole build."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from l2v.errors import UserError
from l2v.report.tables import provenance
from l2v.runs.facts import build_report


@pytest.fixture
def built(tmp_path):
    """A build with two splits, the first in two shards, and a source that only the second has rows of."""
    folder = tmp_path / "byg"
    folder.mkdir()
    for name, count in (("train-00000-of-00002", 50), ("train-00001-of-00002", 30), ("test-00000-of-00001", 7)):
        pq.write_table(pa.table({"text": [f"{name} {at}" for at in range(count)]}), folder / f"{name}.parquet")
    sources = [
        {"label": "avis", "licence": "CC0-1.0", "path": "a.jsonl", "kept": {"train": 80}},
        {"label": "blog", "licence": "CC-BY-4.0", "path": "hub:nogen/blog", "kept": {"test": 7}},
    ]
    report = {"title": "Prøve", "name": "prove", "splits": {"train": 80, "test": 7}, "sources": sources}
    (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("path", "made", "licences", "rows"),
    [
        ("train-*.parquet", "Prøve: avis", "CC0-1.0", "80"),
        ("test-*.parquet", "Prøve: blog", "CC-BY-4.0", "7"),
        ("train-00001-of-00002.parquet", "Prøve: avis", "CC0-1.0", "30"),
        ("", "Prøve: avis, blog", "CC0-1.0, CC-BY-4.0", "87"),
        ("*.parquet", "Prøve: avis, blog", "CC0-1.0, CC-BY-4.0", "87"),
    ],
)
def test_rows_and_licences_are_those_of_the_files_that_are_named(built, path, made, licences, rows):
    assert provenance({"path": str(built / path)}) == ["", made, licences, rows]


def test_a_limit_counts_and_other_files_of_the_folder_are_not_of_the_build(built):
    read = {"path": str(built / "train-*.parquet"), "limit": 12}
    assert provenance(read) == ["at most 12 rows", "Prøve: avis", "CC0-1.0", "12"]
    assert build_report(str(built / "mine.jsonl")) is None


def test_where_only_the_report_is_left_the_split_is_known_by_its_name(built):
    for file in built.glob("*.parquet"):
        file.unlink()
    assert build_report(str(built / "test-*.parquet"))["rows"] == 7
    assert build_report(str(built / "valid-*.parquet")) is None


def test_a_damaged_shard_is_named(built):
    (built / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"test-00000-of-00001\.parquet: not a readable Parquet file"):
        build_report(str(built / "test-*.parquet"))
