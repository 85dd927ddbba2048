"""The count of issued instructions, on kernels that are compiled here, and the predictions made of it."""

import functools
import importlib.util
import json
from types import SimpleNamespace

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("no Triton on this platform", allow_module_level=True)

from benchmarks.kernels.aot import available
from benchmarks.resources import __main__ as tool
from benchmarks.resources import cases, predict, published, sass
from benchmarks.resources.count import count, count_loop
from benchmarks.resources.machine import MACHINES
from benchmarks.resources.predict import Workload

pytestmark = pytest.mark.skipif(not available(), reason="this Triton bundles no NVIDIA tools")


@functools.cache
def compiled(kind="forward"):
    case = cases.attention_case(kind, 90, 128, "long", dropout=False)
    return case, case.build()


def test_the_main_loop_of_a_real_kernel():
    case, used = compiled()
    _, loops = sass.instructions_and_loops(sass.disassemble(used.cubin))
    loop = sass.main_loop(loops)
    # Two loops, with and without masks. The one without has every matmul of a tile and an exp for each score, and no mask.
    assert len([x for x in loops if "tensor" in x.pipes]) == 2
    assert loop.warp_flops * case.warps == case.step_flops
    assert 128 * 128 // (32 * case.warps) <= loop.opcodes["MUFU"] <= 128 * 128 // (32 * case.warps) + 2
    assert loop.opcodes["UTMALDG"] == 2 and not {"LDL", "STL", "FSEL"} & set(loop.opcodes)
    assert "other" not in loop.pipes and sum(loop.pipes.values()) == len(loop.instructions)
    usage = sass.resources(used.cubin)
    assert usage["REG"] == used.registers and usage["STACK"] + usage["LOCAL"] == used.stack


def test_the_forward_meets_its_target():
    case, used = compiled()
    found = count(used, 90, case.warps, case.step_flops, case.step_bytes)
    assert case.target == 0.65 and found.ratio <= case.target and not found.stack
    assert found.blocks == 1 and found.limit == "tensor"
    assert found.ratio < found.tile_ratio(10) < found.tile_ratio(1)
    assert found.bound == found.tensor < found.serial
    assert json.loads(json.dumps(found.row()))["issue_over_tensor"] == round(found.ratio, 3)


def test_the_ranking_has_a_row_a_tile():
    case, _ = compiled()
    row = tool.examine(case, issue=True)
    (line,) = list(tool.ranking([row, {"op": "x"}]))[2:]
    assert line.startswith("| forward | D 128, long segments | 128 x 128") and line.count("|") == 4 + len(
        predict.LENGTHS
    )
    assert row["relative"][30]["time_over_gemm"] > row["relative"][8192]["time_over_gemm"] > 1


def test_a_kernel_without_matmuls_or_a_loop():
    (case,) = [x for x in cases.others([90]) if (x.op, x.kernel) == ("rms_norm", "forward")]
    row = tool.examine(case, issue=True)
    assert "loop" not in row and not tool.misses(row)
    (line,) = list(tool.table([row], issue=True))[2:]
    assert line.startswith("| rms_norm | forward |")


HMMA = "HMMA.16816.F32.BF16 R4, R8, R12, R4"


@pytest.mark.parametrize(
    ("instruction", "pipe", "flops"),
    [
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8].tnspB, R24", "tensor", 2 * 64 * 128 * 16 // 4),
        (HMMA, "tensor", 2 * 16 * 8 * 16),
        ("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP0", "tensor", 0),
        ("UTMALDG.3D [UR8], [UR14]", "shared", 0),
        ("ULDC.64 UR6, c[0x0][0x278]", "global", 0),
        ("UIADD3 UR8, UR13, 0x8000, URZ", "uniform", 0),
        ("MUFU.EX2 R5, R5", "exp", 0),
        ("FFMA R5, R5, UR4, -R9", "fp32", 0),
        ("F2FP.BF16.F32.PACK_AB R5, R6, R5", "alu", 0),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "control", 0),
        ("NEWOP R1", "other", 0),
    ],
)
def test_pipes(instruction, pipe, flops):
    assert sass.pipe_of(instruction) == pipe and sass.matrix_flops(instruction) == flops


def code(*lines):
    """As nvdisasm prints; a label stands on its own line."""
    return "\n".join(x if x.endswith(":") else f"        /*{i:04x}*/   {x} ;" for i, x in enumerate(lines))


def test_loops_that_wait_are_not_loops():
    spin = [".L_x_1:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5", "@!P0 BRA `(.L_x_1)"]
    body = [".L_x_0:", *["FADD R1, R1, R2"] * 20, *spin, "@P1 FMUL R1, R1, R1", HMMA, "@P0 BRA `(.L_x_0)"]
    lines, loops = sass.instructions_and_loops(code("MOV R1, R2", *body, "EXIT"))
    assert len(lines) == 27 and len(loops) == 1
    assert loops[0].opcodes == {"FADD": 20, "SYNCS": 1, "BRA": 2, "FMUL": 1, "HMMA": 1} and loops[0].around == 3


def test_the_machine_code_must_state_its_matmuls():
    loop = sass.Loop(("UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UP0",))
    with pytest.raises(ValueError, match="step_flops"):
        count_loop(loop, 100, 8, (128, 0, 0))
    assert count_loop(loop, 100, 8, (128, 0, 0), step_flops=8192).tensor == 1
    # A warp's matrix instructions reach 62% of a warpgroup's on sm_90.
    assert count_loop(sass.Loop((HMMA,)), 90, 4, (64, 0, 0)).tensor == pytest.approx(4 / 0.62)


def test_blocks_of_an_sm():
    assert MACHINES[90].blocks_per_sm(registers=255, shared=0, warps=8) == 1
    assert MACHINES[90].blocks_per_sm(registers=128, shared=100 << 10, warps=4) == 2
    assert MACHINES[120].blocks_per_sm(registers=32, shared=0, warps=4) == 12


def test_steps_of_a_pack():
    """Against the ranges themselves, written out: tiles of 32 tokens and 16, over segments of 30 and of 128."""
    work = Workload(30, tokens=90)
    # Tokens 0-31 lie in two segments, so need 60 keys, 32-63 in two, 64-89 in one.
    assert predict.steps("forward", 128, 64, work) == [1, 1, 1]
    assert predict.steps("forward", 64, 32, work) == [1, 2, 1, 2, 1, 1]
    # Keys 0-63 are read by 90 tokens, 64-89 by 30; 16 tokens a step.
    assert predict.steps("key", 64, 64, work) == [6, 2]
    assert predict.steps("forward", 128, 128, Workload(128, tokens=256)) == [1] * 8


def test_a_prediction_counts_waste():
    case, used = compiled()
    found = count(used, 90, case.warps, case.step_flops, case.step_bytes)
    made = {n: predict.predict("forward", 128, 128, 2, found, Workload(n)) for n in (30, 128, 8192)}
    assert made[128].waste == made[8192].waste == 1 and made[30].waste > 3
    assert made[30].tflops < made[128].tflops < made[8192].tflops < MACHINES[90].gemm_tflops


def test_above_a_known_error_no_rate_is_quoted(monkeypatch, tmp_path, capsys):
    rows = [published.Check("x", 512, 300.0, 390.0), published.Check("x", 1024, 300.0, 300.0)]
    monkeypatch.setattr(published, "checks", lambda library: rows)
    tool.main(["--check", "lib.so", "--out", str(tmp_path)])
    assert "only rankings" in capsys.readouterr().out
    stored = json.loads((tmp_path / "check.json").read_text())
    assert stored["rates_may_be_quoted"] is False and stored["rows"][0]["error"] == 0.3
    rows[0] = published.Check("x", 512, 300.0, 330.0)
    tool.main(["--check", "lib.so"])
    assert "may be quoted with an error of +0% to +10%" in capsys.readouterr().out


def test_the_exit_code_names_spills(monkeypatch, capsys):
    row = {"op": "x", "kernel": "k", "variant": "v", "sm": 90, "tile": "t", "registers": 1, "shared": 0, "target": None}
    monkeypatch.setattr(tool, "OPS", {"attention": lambda archs: [SimpleNamespace()]})
    monkeypatch.setattr(tool, "examine", lambda case, issue: row | {"spills": 8})
    assert tool.main(["--arch", "90", "--op", "attention"]) == 1
    assert "spills 8 bytes" in capsys.readouterr().err
    monkeypatch.setattr(tool, "examine", lambda case, issue: row | {"spills": 0})
    assert tool.main(["--arch", "90", "--op", "attention"]) == 0


def test_one_ops_table_keeps_the_rows_of_others(tmp_path, monkeypatch):
    """The ranking of attention's tiles is read again from JSON, whose keys are text."""
    path = tmp_path / "sm_90.json"
    old = [{"op": "swiglu", "registers": 1}, {"op": "info_nce", "registers": 2}]
    old.insert(0, {"op": "attention", "relative": {30: {"waste": 1.5}}})
    new = [{"op": "info_nce", "registers": 3}]
    assert tool._with_others(path, new, ["info_nce"]) == new
    path.write_text(json.dumps({"triton": tool.triton.__version__, "rows": old}))
    assert tool._with_others(path, new, ["info_nce"]) == [old[0], *new, old[1]]
    path.write_text(json.dumps({"triton": "1.0", "rows": old}))
    assert tool._with_others(path, new, ["info_nce"]) == new, "of another compiler"
