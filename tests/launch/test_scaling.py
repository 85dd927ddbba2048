"""`l2v plan` on many GPUs, and the page of predictions."""

import json

import pytest
from support.processes import ROOT

from benchmarks.communication.scaling import markdown
from l2v.commands import plan


def planned(capsys, *arguments):
    assert plan.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def written():
    return json.loads((ROOT / "docs" / "results" / "scaling" / "scaling.json").read_text(encoding="utf-8"))


def test_the_page_holds_what_the_command_wrote(written):
    tables = markdown(written)
    assert tables == (ROOT / "docs" / "results" / "scaling" / "scaling.md").read_text(encoding="utf-8")
    assert (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8").endswith(tables)


def test_what_was_written_is_what_the_plan_says_today(written, capsys):
    arguments = ("llama3-8b-da", "--gpu", "h200", "--gpus", 8, "--stage", "simcse", "zero.config=zero1")
    now = planned(capsys, *arguments)["stages"]["simcse"]
    then = written["zero"]["1"]["simcse"]
    assert [row["sent_by_a_rank"] for row in now["wire"]] == [row["sent"] for row in then["wire"]]
    for a, b in zip(now["scaling"], then["scaling"], strict=True):
        assert (a["gpus"], a["grown"], a["fixed"]) == pytest.approx((b["gpus"], b["grown"], b["fixed"]), rel=1e-6)


def test_more_gpus_lose_more_and_a_faster_network_less(capsys):
    arguments = ("llama3-8b-da", "--gpu", "h100", "--gpus", 16, "--stage", "mntp", "batch=64")
    slow = planned(capsys, *arguments)["stages"]["mntp"]
    fast = planned(capsys, *arguments, "--network", 3200)["stages"]["mntp"]
    assert [row["gpus"] for row in slow["scaling"]] == [2**i for i in range(11)]
    grown = {row["gpus"]: row["grown"] for row in slow["scaling"]}
    assert grown[1] == 1 and grown[8] > grown[16] > grown[1024] > 0
    assert slow["scaling"][4]["grown_batch"] == 64
    assert all(a["grown"] < b["grown"] for a, b in zip(slow["scaling"][4:], fast["scaling"][4:], strict=True))
    assert fast["speed"]["seconds_by_kind"]["communication"] < slow["speed"]["seconds_by_kind"]["communication"] / 4


def test_one_gpu_sends_nothing(capsys):
    stage = planned(capsys, "llama3-8b-da", "--gpu", "h200", "--stage", "mntp")["stages"]["mntp"]
    assert stage["wire"] == [] and stage["scaling"] == []
    assert plan.main(["llama3-8b-da", "--gpu", "h200", "--gpus", "8", "--stage", "mntp"]) == 0
    shown = capsys.readouterr().out
    assert "sent by each rank per step, MB" in shown and "updated adapters (all-gather)" in shown
    assert "nodes of 8 GPUs are connected at 400 Gb/s" in shown


def test_the_network_has_a_speed(capsys):
    assert plan.main(["llama3-8b-da", "--gpu", "h200", "--network", "0"]) == 1
    assert "--network is in Gb/s and must be above 0" in capsys.readouterr().err
