"""Profile mode: what it writes of a real run, and the table of traces whose times are known."""

import gzip
import json

import pytest
import torch
from torch import nn

from l2v.training.profile import COLORS, Profile, kind_of_module, markdown, which_steps
from l2v.training.trace import KINDS, STEP, kind_of_name, read, tabulate
from l2v_kernels.spans import recording, span, spanned

ALONE = {"stages.simcse.from": "base", "stages.supervised.from": "base"}
CUDA_NAMES = {
    "gemm": [
        "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8>(cutlass_80_tensorop_bf16_"
        "s16816gemm_relu_bf16_256x128_32x3_nn_align8::Params)",
        "ampere_bf16_s16816gemm_bf16_128x256_ldg8_f2f_stages_64x3_tn",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true, true, false>",
        "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4, false, false>",
    ],
    "attention": [
        "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128, 128, 64, 4, false, false, "
        "cutlass::bfloat16_t>>(pytorch_flash::Flash_fwd_params)",
        "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)",
        "query_gradient_kernel",
        "key_gradient_kernel",
    ],
    "lora": ["lora_down_kernel", "lora_backward_kernel", "dropout_kernel"],
    "head": ["softmax_stats_kernel"],
    "loss": ["fused_statistics_kernel", "coefficients_kernel", "norms_kernel", "finish_kernel"],
    "rope": ["rope_kernel"],
    "pooling": ["pool_kernel", "combine_kernel"],
    "swiglu": ["void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel(at::TensorIteratorBase&)>"],
    "norm": ["void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(int, float)"],
    "optimizer": [
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::FusedAdamMathFunctor<float, 4>>"
    ],
    "communication": ["ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"],
    "copy": ["Memcpy HtoD (Pinned -> Device)", "Memcpy DtoD (Device -> Device)", "Memset (Device)"],
}
UNKNOWN = [
    "forward_kernel",  # several ops call theirs so: only a span can tell
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul>>",
]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in CUDA_NAMES.items() for name in names])
def test_kernels_by_their_name(kind, name):
    assert kind_of_name(name) == kind


@pytest.mark.parametrize("name", UNKNOWN)
def test_kernels_whose_name_says_nothing(name):
    assert kind_of_name(name) is None


def test_every_kind_has_a_colour():
    assert set(COLORS) == set(KINDS) and len(set(COLORS.values())) == len(KINDS)


@pytest.mark.parametrize(
    ("start", "steps", "traced"),
    [
        (0, 100, [3, 4, 5]),
        (0, 5, [3, 4, 5]),
        (0, 4, [3, 4]),
        (0, 3, [3]),
        (0, 2, [2]),
        (0, 1, [1]),
        (40, 100, [43, 44, 45]),
        (99, 100, [100]),
        (100, 100, []),
    ],
)
def test_which_steps(start, steps, traced):
    assert list(which_steps(start, steps)) == traced


class Trace:
    """A trace written by hand, times in microseconds."""

    def __init__(self):
        self.events, self.number = [], 0

    def add(self, name, start, duration, category="cpu_op", thread=1, **args):
        event = {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": thread, "args": args}
        self.events.append(event)

    def span(self, name, start, duration, thread=1):
        self.add(name, start, duration, "user_annotation", thread)

    def launch(self, kernel, at, start, duration, thread=1, stream=7, category="kernel"):
        """A kernel and the call that launched it at `at`."""
        self.number += 1
        self.add("cudaLaunchKernel", at, 1, "cuda_runtime", thread, correlation=self.number)
        self.add(kernel, start, duration, category, stream, correlation=self.number)

    def flow(self, forward, backward, thread=2):
        """From a forward at this time in thread 1 to its backward at that time in another."""
        self.number += 1
        for phase, at, tid in (("s", forward, 1), ("f", backward, thread)):
            self.events.append(
                {"ph": phase, "cat": "fwdbwd", "name": "fwdbwd", "ts": at, "tid": tid, "id": self.number}
            )

    def table(self):
        return tabulate(self.events)


def by_kind(table) -> dict:
    assert [use.kind for use in table.uses] == list(KINDS)
    assert sum(use.share for use in table.uses) == pytest.approx(1)
    assert sum(use.ms for use in table.uses) == pytest.approx(table.step_ms)
    return {use.kind: (round(use.ms * 1000, 6), use.launches) for use in table.uses if use.ms or use.launches}


GEMM, ADD = CUDA_NAMES["gemm"][0], UNKNOWN[1]


def test_kernels_of_a_step_by_hand():
    """A span says what a kernel is; else its name; copies and NCCL whatever the span; idle is what is left of the step."""
    trace = Trace()
    trace.span(STEP, 0, 1000)
    trace.launch(GEMM, 10, 20, 300)
    trace.span("l2v::norm", 30, 10)
    trace.launch("forward_kernel", 32, 320, 50)
    trace.span("l2v::lora", 50, 60)
    trace.launch(GEMM, 52, 400, 40)
    trace.span("l2v::gemm", 60, 10)
    trace.launch(GEMM, 62, 440, 100)
    trace.launch("Memcpy HtoD (Pinned -> Device)", 80, 540, 10, category="gpu_memcpy")
    trace.launch(CUDA_NAMES["communication"][0], 90, 550, 30)
    trace.launch(ADD, 200, 600, 25)
    table = trace.table()
    assert (table.counted, table.steps, table.step_ms) == ("kernels", 1, 1.0)
    assert by_kind(table) == {
        "gemm": (400, 2),
        "norm": (50, 1),
        "lora": (40, 1),
        "copy": (10, 1),
        "communication": (30, 1),
        "other": (25, 1),
        "idle": (1000 - 555, 0),
    }
    assert table.longest[0] == {"name": GEMM, "kind": "gemm", "ms": 0.4, "launches": 2}


def test_a_backward_belongs_to_the_span_of_its_forward():
    trace = Trace()
    trace.span(STEP, 0, 1000)
    trace.span("l2v::attention", 10, 40)
    trace.add("aten::mul", 20, 10)
    trace.launch(ADD, 21, 100, 10)
    trace.add("aten::mul", 60, 10)
    trace.launch(ADD, 61, 110, 20)
    trace.flow(20, 300)
    trace.flow(60, 400)
    for at, name in ((300, "MulBackward0"), (400, "MulBackward0"), (500, "torch::autograd::AccumulateGrad")):
        trace.add(f"autograd::engine::evaluate_function: {name}", at, 50, thread=2)
        trace.add("aten::mul", at + 10, 10, thread=2)
        trace.launch(ADD, at + 11, at + 20, 30, thread=2)
    assert by_kind(trace.table()) == {"attention": (40, 2), "other": (50, 2), "optimizer": (30, 1), "idle": (880, 0)}


def test_a_kernel_whose_launch_is_not_in_the_trace():
    """It names the operator that it belongs to."""
    trace = Trace()
    trace.span(STEP, 0, 100)
    trace.span("l2v::norm", 10, 20)
    trace.add("aten::mul", 12, 10, **{"External id": 77})
    trace.add("forward_kernel", 40, 5, "kernel", 7, **{"External id": 77, "correlation": 9})
    trace.add("forward_kernel", 50, 5, "kernel", 7, **{"External id": 78, "correlation": 10})
    assert by_kind(trace.table()) == {"norm": (5, 1), "other": (5, 1), "idle": (90, 0)}


def test_what_a_backward_makes_again_belongs_to_its_own_span():
    """A norm that is recomputed inside the backward of something else."""
    trace = Trace()
    trace.span(STEP, 0, 100)
    trace.span("l2v::lora", 0, 20)
    trace.add("GroupLinear", 5, 10)
    trace.flow(5, 50)
    trace.add("autograd::engine::evaluate_function: GroupLinearBackward", 50, 40, thread=2)
    trace.span("l2v::norm", 60, 10, thread=2)
    trace.launch("forward_kernel", 61, 62, 8, thread=2)
    trace.launch(ADD, 75, 76, 4, thread=2)
    assert by_kind(trace.table()) == {"norm": (8, 1), "lora": (4, 1), "idle": (88, 0)}


def test_kernels_side_by_side_share_the_time():
    trace = Trace()
    trace.span(STEP, 0, 100)
    trace.launch(GEMM, 1, 10, 40)
    trace.launch(CUDA_NAMES["communication"][0], 2, 30, 40, stream=9)
    assert by_kind(trace.table()) == {"gemm": (30, 1), "communication": (30, 1), "idle": (40, 0)}


def test_what_lies_between_steps_does_not_count():
    """A checkpoint between two steps; a kernel that the step before left running."""
    trace = Trace()
    trace.span(STEP, 100, 100)
    trace.span(STEP, 1100, 100)
    trace.launch(GEMM, 50, 90, 30)
    trace.launch(GEMM, 300, 400, 500)
    trace.launch(GEMM, 1110, 1120, 50)
    table = trace.table()
    assert (table.steps, table.step_ms) == (2, 0.1)
    assert by_kind(table) == {"gemm": ((20 + 50) / 2, 1), "idle": (65, 0)}


def test_operators_of_a_cpu_by_hand():
    """Time is that of an operator alone; a span or a function of autograd is none; other threads do not count."""
    trace = Trace()
    trace.span(STEP, 0, 1000)
    trace.add("aten::linear", 10, 100)
    trace.add("aten::t", 12, 5)
    trace.add("aten::addmm", 20, 80)
    trace.add("aten::copy_", 25, 10)
    trace.span("l2v::swiglu", 200, 100)
    trace.add("GatedMlp", 210, 80)
    trace.add("aten::mul", 220, 60)
    trace.add("aten::rand", 400, 50)
    trace.add("aten::mm", 0, 900, thread=3)
    table = trace.table()
    assert table.counted == "operators"
    assert by_kind(table) == {"gemm": (90, 1), "copy": (10, 0), "swiglu": (60, 1), "other": (50, 1), "idle": (790, 0)}
    assert [(row["name"], row["launches"]) for row in table.longest[:2]] == [("aten::addmm", 1), ("aten::mul", 1)]
    assert "Idle: no operator runs" in markdown(table, [3], "a processor")


def test_a_trace_without_a_step_is_refused():
    with pytest.raises(ValueError, match="no span 'l2v::step'"):
        tabulate([])


def test_spans_reach_the_profiler_only_while_recorded():
    @spanned("norm")
    def halved(x):
        """Half."""
        return x / 2

    def names():
        with torch.profiler.profile() as profile:
            assert halved(torch.ones(3)).tolist() == [0.5] * 3
            with span("loss"):
                torch.ones(1)
        return {event.key for event in profile.key_averages()}

    assert not {"l2v::norm", "l2v::loss"} & names() and halved.__doc__ == "Half."
    with recording():
        assert {"l2v::norm", "l2v::loss"} <= names()
    assert not {"l2v::norm", "l2v::loss"} & names()


class LlamaMLP(nn.Module):
    pass


def test_modules_of_unfused_layers():
    assert kind_of_module("decoder.layers.0.mlp", LlamaMLP()) == "swiglu"
    assert kind_of_module("decoder.layers.0.mlp.up_proj.base_layer", nn.Linear(2, 2)) == "gemm"
    assert kind_of_module("decoder.layers.0.mlp.up_proj.lora_A.default", nn.Linear(2, 2)) == "lora"
    assert kind_of_module("head", nn.Linear(2, 2)) == "head"
    assert kind_of_module("decoder.norm", nn.LayerNorm(2)) == "norm"
    assert kind_of_module("decoder.layers.0", nn.Module()) is None


@pytest.mark.parametrize(
    ("stage", "layers"),
    [("mntp", "auto"), pytest.param("mntp", "plain", marks=pytest.mark.slow), ("supervised", "auto")],
)
def test_a_profile_of_a_run(run_here, tiny_recipe, tmp_path, stage, layers):
    recipe = tiny_recipe(tmp_path, **ALONE, **{f"stages.{stage}.micro_tokens": 160})
    said = run_here(recipe, "--stage", stage, "steps=6", "profile=true", f"base.layers={layers}")
    assert "profile of steps 3 to 5:" in said
    folder = tmp_path / "run" / stage / "profile"
    assert {file.name for file in folder.iterdir()} == {"trace.json.gz", "table.json", "table.md", "time.png"}
    table = json.loads((folder / "table.json").read_text())
    assert table["steps"] == 3 and table["traced"] == [3, 4, 5]
    uses = {use["kind"]: use for use in table["uses"]}
    assert list(uses) == list(KINDS)
    assert sum(use["share"] for use in uses.values()) == pytest.approx(1)
    assert sum(use["ms"] for use in uses.values()) == pytest.approx(table["step_ms"])
    expected = {"gemm", "attention", "norm", "lora", "swiglu", "rope", "optimizer", "idle"}
    expected |= {"head"} if stage == "mntp" else {"loss", "pooling"}
    assert all(uses[kind]["ms"] > 0 for kind in expected), uses
    assert all(uses[kind]["launches"] > 0 for kind in expected - {"idle"})
    assert uses["other"]["share"] < 0.1
    assert "| gemm |" in (folder / "table.md").read_text() and (folder / "time.png").stat().st_size > 5000
    # The file that people open is the one that was read.
    with gzip.open(folder / "trace.json.gz", "rt") as stream:
        assert json.load(stream)["traceEvents"]
    assert tabulate(read(folder / "trace.json.gz")).step_ms == pytest.approx(table["step_ms"])


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_of_few_steps(run_here, tiny_recipe, tmp_path, steps):
    run_here(tiny_recipe(tmp_path), "--stage", "mntp", f"steps={steps}", "profile=true")
    table = json.loads((tmp_path / "run" / "mntp" / "profile" / "table.json").read_text())
    assert table["traced"] == [steps] and table["steps"] == 1


def test_it_changes_nothing_that_is_learned(run_here, tiny_recipe, tmp_path):
    """Nor whose run it is: a profile may be asked for when a run resumes."""
    adapters = []
    for out, options in (("plain", []), ("traced", ["profile=true"])):
        run_here(tiny_recipe(tmp_path), "--stage", "mntp", f"out={tmp_path / out}", *options)
        adapters.append((tmp_path / out / "mntp" / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
    assert not (tmp_path / "plain" / "mntp" / "profile").exists()
    said = run_here(tiny_recipe(tmp_path), "--stage", "mntp", f"out={tmp_path / 'plain'}", "profile=true")
    assert "already trained" in said


def test_a_folder_that_cannot_be_written_does_not_stop_training(tmp_path):
    (tmp_path / "file").write_text("")
    said = []
    model = nn.Linear(4, 4)
    profile = Profile(
        model, tmp_path / "file" / "profile", start=0, steps=1, device=torch.device("cpu"), log=said.append
    )
    with profile.step(1):
        model(torch.ones(1, 4))
    assert len(said) == 1 and "the profile cannot be written: Not a directory" in said[0]
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_driver_that_lets_nobody_look_is_told(tmp_path, monkeypatch):
    """A GPU, and a trace in which no kernel is."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    said = []
    profile = Profile(nn.Linear(4, 4), tmp_path, start=0, steps=1, device=torch.device("cuda"), log=said.append)
    with profile.step(1):
        torch.ones(1).add_(1)
    assert (
        len(said) == 1 and "the trace has no kernels" in said[0] and "NVreg_RestrictProfilingToAdminUsers=0" in said[0]
    )
    assert {file.name for file in tmp_path.iterdir()} == {"trace.json.gz"}


def test_training_that_ends_within_the_traced_steps_leaves_no_hooks(tmp_path):
    model = nn.Linear(4, 4)
    profile = Profile(model, tmp_path, start=0, steps=9, device=torch.device("cpu"))
    for number in (1, 2, 3):
        with profile.step(number):
            model(torch.ones(1, 4))
    assert model._forward_hooks
    profile.close()
    assert not model._forward_hooks and not list(tmp_path.iterdir())
