"""The table of `l2v plan`, from made recordings and as it is committed."""

from __future__ import annotations

import json

import pytest

from l2v.plan import counts

from .place import NullGpuError
from .plan_counts import KINDS, STEPS, TABLE, ZERO, cases, rendered, table
from .run import Run

LAYER = {("fused", "none"): (17, 23), ("fused", "cheap"): (17, 25), ("fused", "layer"): (18, 41)}
LAYER |= {("plain", "none"): (70, 130), ("plain", "layer"): (70, 200)}


def made(each, uneven: int = 0) -> Run:
    """A run that launches LAYER a layer, 60 and 80 around them; a layer takes 1 and 2 ms, the update 5 ms times ZeRO."""
    kind, way, layers, zero = each.name.removeprefix("plan-").replace("-layers-zero", "-").split("-")
    forward, backward = (int(layers) * own for own in LAYER[kind, way])
    phases = {"forward": (60 + forward + uneven, 0.01 + 0.001 * int(layers)), "agreement": (19, 0.001)}
    phases |= {"backward": (80 + backward, 0.02 + 0.002 * int(layers)), "update": (26, 0.005 * int(zero))}
    intervals = [
        {"stage": "mntp", "step": step, "phase": phase, "launches": count, "cpu": cpu * (9 if step < 3 else 1)}
        for step in range(1, STEPS + 1)
        for phase, (count, cpu) in phases.items()
    ]
    versions = {"torch": "2.11.0", "triton": "3.6.0", "deepspeed": "0.19.8"}
    return Run(each, [0], ["done"], [{"intervals": intervals, "versions": versions}])


def test_the_table_is_made_of_differences(tmp_path):
    tree = table({each.name: made(each) for each in cases()}, 2e-6, 0.5)
    assert tree["layer_launches"]["fused"] == {"none": [17, 23], "cheap": [17, 25], "layer": [18, 41]}
    assert tree["layer_launches"]["plain"] == {"none": [70, 130], "layer": [70, 200]}
    assert tree["other_launches"] == [60, 80]
    assert tree["update_launches"] == dict.fromkeys(map(str, ZERO), 45)
    assert tree["layer_seconds"] == [0.001, 0.002]
    assert tree["update_seconds"] == {"0": 0.001, "1": 0.006, "2": 0.011, "3": 0.016}
    file = tmp_path / "counts.json"
    file.write_text(rendered(tree))
    assert counts.load(file).micro_batch(32, True, "none")[0][0] == 32 * 17 + 60


@pytest.mark.parametrize(("at", "sentence"), [("-4-layers-zero1", "not the same number a layer"), ("-32-", "not the")])
def test_launches_that_do_not_grow_evenly_are_refused(at, sentence):
    runs = {each.name: made(each, uneven=at in each.name and "fused-none" in each.name) for each in cases()}
    with pytest.raises(NullGpuError, match=sentence):
        table(runs, 2e-6, 0.5)


def test_the_committed_table_has_every_kind():
    tree = json.loads(TABLE.read_text())
    assert {kind: tuple(ways) for kind, ways in tree["layer_launches"].items()} == KINDS
    assert set(tree["update_launches"]) == set(tree["update_seconds"]) == set(map(str, ZERO))
    assert "python -m tests.nullgpu plan-counts" in tree["source"]
    assert rendered(tree) == TABLE.read_text()
