"""`l2v doctor`: what it says of this machine, and of machines that lack something."""

import ctypes
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.processes import ROOT, free_port, training_environment
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from l2v.commands import doctor
from l2v.doctor import hardware, software
from l2v.doctor.report import Report, render, tree
from l2v.machine import gpus as gpu_facts

OPS = {path.parent.name for path in (ROOT / "kernels" / "l2v_kernels").glob("*/kernel*.py")}
TOPOLOGY = (
    "\x1b[4m\tGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
    "GPU0\t X \tNV18\tSYS\tPIX\t0-47\t0\t\tN/A\n"
    "GPU1\tNV18\t X \tNV18\tSYS\t0-47\t0\t\tN/A\n"
    "GPU2\tSYS\tNV18\t X \tSYS\t48-95\t1\t\tN/A\n"
    "NIC0\tPIX\tSYS\tSYS\t X \t\t\t\t\n\nLegend:\n\n  X    = Self\n"
)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A cache of its own, no GPU in sight, and the number of threads left as it was."""
    monkeypatch.setenv("L2V_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def said(capsys, *arguments: str, code: int = 0) -> str:
    assert doctor.main(list(arguments)) == code
    return capsys.readouterr().out


def test_a_report_to_paste(capsys):
    text = said(capsys, "--seconds", "0.2")
    assert "\033" not in text and max(map(len, text.splitlines())) < 200
    assert text.splitlines()[-1] == "training can run here"
    for title in ("machine", "devices", "versions", "kernels", "backends", "files", "calibration"):
        assert f"\n{title}\n" in text
    assert "could not be determined" not in text
    assert re.search(r"torch +\d+\.\d+\S* \((built without CUDA|CUDA [\d.]+)\)", text)
    for op in OPS:
        assert re.search(rf"^  {op} +no  PyTorch reference: Triton needs a GPU$", text, re.M), op
    assert re.search(r"base_precision: fp8 +no  needs a GPU of compute capability 8\.9, and there is no GPU", text)
    assert re.search(r"matmul +[\d.]+ [MGT]FLOP/s in (float32|bfloat16)$", text, re.M)


def test_as_json_with_what_was_measured_before(capsys):
    nothing = json.loads(said(capsys, "--json", "--seconds", "0"))
    assert nothing["rates"] is None and "none yet" in nothing["calibration"][""]
    measured = json.loads(said(capsys, "--json", "--seconds", "0.2"))
    assert measured["rates"]["gemm_flops"] > 1e8 and measured["rates"]["copy_bytes"] > 1e8
    assert json.loads(said(capsys, "--json", "--seconds", "0"))["rates"] == measured["rates"]
    assert set(measured["kernels"]) == OPS and not measured["kernels"]["rope"]["available"]
    assert measured["problems"] == []


def test_what_is_missing_or_too_old_is_a_problem(capsys, monkeypatch):
    real = software._version
    monkeypatch.setattr(
        software, "_version", lambda name: {"peft": None, "transformers": "4.40.0"}.get(name, real(name))
    )
    monkeypatch.setattr(software, "requirements", lambda: {"peft": ">=0.18", "transformers": ">=5.17,<6"})
    text = said(capsys, "--seconds", "0", code=1)
    assert "peft is not installed: pip install 'peft>=0.18'" in text
    assert "transformers is 4.40.0 and l2v needs >=5.17,<6: pip install 'transformers>=5.17,<6'" in text
    assert text.splitlines()[-1].startswith("training cannot run here")


def test_its_own_requirements_are_met_here():
    needs = software.requirements()
    assert needs["transformers"] == "<6,>=5.17" or needs["transformers"] == ">=5.17,<6"
    assert all(software._satisfies(software._version(name), needs.get(name, "")) for name in software.REQUIRED)


def test_without_torch_there_is_still_a_report(tmp_path):
    """In a process where torch cannot be imported at all."""
    code = "import sys; sys.modules['torch'] = None; from l2v.commands.main import main; sys.exit(main(['doctor']))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=training_environment(), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr, done.stderr
    assert re.search(r"torch [\d.+a-z]+ cannot be imported", done.stdout)
    assert "this folder" in done.stdout and "embedded base" in done.stdout


def test_a_gpu_that_cannot_be_used_is_a_problem(capsys, monkeypatch):
    facts = gpu_facts.Facts(cuda="13.0", device=True, error="driver on your system is too old (found version 12020)")
    monkeypatch.setattr(gpu_facts, "inspect", lambda memory: facts)
    text = said(capsys, "--seconds", "0", code=1)
    assert "problems\n  - the NVIDIA driver supports CUDA 12.2 at most" in text
    assert "GPU  no  there is a GPU, but it cannot be used" in text


def test_a_gpu_beside_a_torch_without_cuda_is_a_note(capsys, monkeypatch):
    monkeypatch.setattr(gpu_facts, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    text = said(capsys, "--seconds", "0")
    assert "notes\n  - there is a GPU, but torch" in text and "install a torch that is built for CUDA" in text


def test_folders_that_cannot_be_written(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("L2V_CACHE", str(tmp_path / "file" / "cache"))
    text = said(capsys, "--seconds", "0.1")
    assert re.search(r"^  cache +no  .*cannot be written: Not a directory$", text, re.M)
    assert "set L2V_CACHE to one that can" in text and re.search(r"kept in +no  .*cannot be written", text)


def test_a_look_that_fails_is_a_line(monkeypatch):
    def machine(report):
        raise OSError("no such thing")

    report = Report()
    report.add("machine", machine)
    assert report.sections["machine"] == {"": "could not be determined: OSError: no such thing"}
    assert "could not be determined" in render(report, color=False)


def test_colours_only_where_somebody_looks():
    report = Report({"kernels": {"rope": (False, "why"), "attention": (True, "Triton")}}, problems=["one"])
    plain, coloured = render(report, color=False), render(report, color=True)
    assert re.sub(r"\033\[\d+m", "", coloured) == plain and "\033[31m" in coloured
    assert "  rope       no  why\n  attention  yes Triton" in plain
    assert tree(report)["kernels"]["rope"] == {"available": False, "text": "why"}


def driver(version: int, status: int = 0) -> SimpleNamespace:
    """A driver's library: C functions, called as ctypes calls them."""

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int))
    def get_version(out):
        out[0] = version
        return status

    return SimpleNamespace(cuDriverGetVersion=get_version)


@pytest.fixture
def gpus(monkeypatch):
    """gpus(name, capability, free, total, works): a machine with two of these; memory in GiB."""

    def load(name):
        assert name == "libcuda.so.1"
        return driver(13000)

    def pretend(
        name="NVIDIA H100 80GB HBM3", capability=(9, 0), free=78.0, total=79.0, works=True, library=load, cuda="12.8"
    ):
        def ones(*shape, device):
            if not works:
                raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore")
            return torch.zeros(*shape)

        properties = SimpleNamespace(
            name=name,
            major=capability[0],
            minor=capability[1],
            total_memory=int(total * 2**30),
            multi_processor_count=132,
        )
        for owner, attribute, value in (
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "device_count", lambda: 2),
            (torch.cuda, "get_device_properties", lambda at: properties),
            (torch.cuda, "mem_get_info", lambda at: (int(free * 2**30), int(total * 2**30))),
            (torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"]),
            (torch.cuda.nccl, "version", lambda: (2, 27, 3)),
            (ctypes, "CDLL", library),
            (torch.version, "cuda", cuda),
            (torch, "ones", ones),
            (
                gpu_facts,
                "nvidia_smi",
                lambda *arguments: TOPOLOGY if arguments[0] == "topo" else "580.65.06\n580.65.06\n",
            ),
        ):
            monkeypatch.setattr(owner, attribute, value)  # raises where torch has no such name
        monkeypatch.delenv("DS_ACCELERATOR", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")  # nobody hid them
        report = Report()
        report.add("devices", hardware.devices)
        return report

    return pretend


def test_gpus_are_described(gpus):
    report = gpus()
    assert report.sections["devices"] == {
        "cuda:0": "NVIDIA H100 80GB HBM3, compute capability 9.0, 79.0 GiB, 78.0 free, 132 multiprocessors, "
        "989 TFLOP/s bf16 by its data sheet",
        "cuda:1": report.sections["devices"]["cuda:0"],
        "CUDA": "driver up to 13.0, torch 12.8",
        "NCCL": "2.27.3",
        "driver": "580.65.06",
        "links": "NV18 between 2 pairs, SYS between 1 pairs",
    }
    assert not report.problems and not report.notes


@pytest.mark.parametrize(
    ("what", "problem", "note"),
    [
        (
            {"works": False},
            "cuda:0 (NVIDIA H100 80GB HBM3, compute capability 9.0) does not work: RuntimeError: CUDA",
            None,
        ),
        ({"name": "Tesla P4", "capability": (6, 1)}, "has no code for cuda:0 (Tesla P4, compute capability 6.1)", None),
        (
            {"name": "Tesla T4", "capability": (7, 5)},
            "cuda:0 (Tesla T4, compute capability 7.5) is too old: bf16 and the kernels need 8.0 or newer",
            None,
        ),
        ({"free": 20.0}, None, "59.0 of 79.0 GiB of cuda:0 are already in use"),
    ],
)
def test_gpus_that_do_not_serve(gpus, what, problem, note):
    report = gpus(**what)
    assert (problem in report.problems[0]) if problem else not report.problems
    assert (note in report.notes[0]) if note else not report.notes


@pytest.mark.parametrize(
    ("library", "newest"),
    [
        (driver(12020), "12.2"),
        (driver(12080), "12.8"),
        (driver(13010), "13.1"),
        (driver(0), None),  # a stub: CUDA without a driver
        (driver(12080, status=34), None),
        (SimpleNamespace(), None),
        (OSError("libcuda.so.1: cannot open shared object file"), None),
    ],
)
def test_the_driver_names_the_newest_cuda_it_supports(monkeypatch, gpus, library, newest):
    def load(name):
        if isinstance(library, OSError):
            raise library
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert gpu_facts.newest_cuda() == newest
    report = gpus(library=load)
    assert report.sections["devices"]["CUDA"] == (f"driver up to {newest}, torch 12.8" if newest else "torch 12.8")
    assert not report.problems


def test_rocm_has_no_cuda(gpus, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.1.25424")
    rows = gpus(name="AMD Instinct MI300X", cuda=None).sections["devices"]
    assert rows["ROCm"] == "torch 7.1.25424" and "CUDA" not in rows


def test_links_between_gpus():
    assert hardware.links(TOPOLOGY) == "NV18 between 2 pairs, SYS between 1 pairs"
    assert hardware.links(TOPOLOGY.replace("SYS", "NV18")) == "NV18 between all 3 pairs"


def test_a_kernel_is_compiled_and_compared(monkeypatch):
    """Triton's own failure is told; a kernel that computes something else is found."""
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x: x)
    assert software.triton_error() is None
    import l2v_kernels

    real, calls = l2v_kernels.dropout, []

    def first_call_differs(*arguments):
        calls.append(1)
        return real(*arguments) * (2 if len(calls) == 1 else 1)

    monkeypatch.setattr(l2v_kernels, "dropout", first_call_differs)
    assert software.triton_error() == "dropout differs from its reference"

    def fails(*arguments):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    monkeypatch.setattr(l2v_kernels, "dropout", fails)
    assert software.triton_error().startswith("RuntimeError: Failed to find C compiler. Please specify via CC")


@pytest.mark.parametrize("rate", [(788e12, "788 TFLOP/s"), (96.3e9, "96.3 GFLOP/s"), (5e6, "5 MFLOP/s")])
def test_rates_have_three_digits(rate):
    assert hardware.rate(rate[0], "FLOP/s") == rate[1]


@pytest.fixture
def hub_rows(monkeypatch):
    """hub_rows(endpoint=None, offline=False, seconds=2) -> (the row `hub`, the notes)."""
    from huggingface_hub import constants

    def rows(endpoint="", offline=False, seconds=2.0):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(software, "HUB_SECONDS", seconds)
        report = Report()
        return software.hub(report), report.notes

    return rows


@pytest.fixture
def answering():
    """answering(status) -> the address of a server that answers every HEAD with it."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    servers = []

    def start(status):
        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_hub_is_asked_before_it_is_called_online(hub_rows, answering):
    for status in (200, 404):
        url = answering(status)
        assert hub_rows(url) == ((True, f"{url} answers"), [])
    url = f"http://127.0.0.1:{free_port()}"  # nobody listens there
    (works, text), [note] = hub_rows(url)
    assert not works and text.startswith(f"{url} cannot be reached: ") and "refused" in text
    assert note.startswith(f"the hub, {url}, cannot be reached: ") and "HF_HUB_OFFLINE=1 spares the waiting" in note


def test_a_hub_that_is_silent_or_broken_does_not_keep_the_doctor(hub_rows, answering):
    import socket
    import time

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        (works, text), _ = hub_rows(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.5)
        assert not works and "cannot be reached" in text and time.monotonic() - began < 10
    (works, text), _ = hub_rows(answering(503))
    assert not works and text.endswith("it answers with status 503")


def test_an_offline_hub_is_not_asked(hub_rows, monkeypatch):
    monkeypatch.setattr(software, "hub_trouble", lambda *_: pytest.fail("asked"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub_rows("http://127.0.0.1:9", offline=True) == (
        (False, "offline by HF_HUB_OFFLINE=1: only what is in its cache is used"), []
    )  # fmt: skip


THIRD = [
    "llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "stablelm", "granite", "gemma", "gemma2", "gpt_oss", "minicpm3",
    "gpt2", "gpt_neo", "bloom", "mpt", "opt", "falcon", "lfm2", "falcon_h1", "recurrent_gemma", "mamba", "bert",
    "xlm-roberta", "distilbert", "albert", "mpnet", "eurobert", "gte", "modernbert", "nemotron", "cohere", "ernie4_5",
]  # fmt: skip


def committed() -> dict[str, str]:
    """The rows of docs/bases.md by architecture."""
    text = (ROOT / "docs" / "bases.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| (\S+) (\| .* \|)$", text.partition("<!-- written by")[2], re.M)[1:])


def rows_of(table: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (\S+) (\| .* \|)$", table, re.M)[1:])


def without_digits(rows: dict[str, str]) -> dict[str, str]:
    """How far a path that is not taken leaks differs in the last digit between machines."""
    return {name: re.sub(r"\d+(\.\d+)?(e-?\d+)?", "#", row) for name, row in rows.items()}


def test_a_third_of_the_matrix_is_what_the_command_prints(capsys):
    known = [name for name in THIRD if name in CONFIG_MAPPING]  # an older transformers lacks one or two

    def served(rows):  # it may also need another attention in an export, which is then stated
        return {
            name: re.sub(r"equal with \w+ attention, [^|]*", "equal ", row)
            for name, row in without_digits(rows).items()
        }

    found = served(rows_of(said(capsys, "--bases", ",".join(known))))
    assert found == {name: row for name, row in served(committed()).items() if name in known}
    assert len(found) == len(known) > 0.9 * len(THIRD) and len(THIRD) >= len(committed()) // 3


@pytest.mark.slow
def test_the_whole_matrix_is_what_the_command_prints(capsys):
    assert without_digits(rows_of(said(capsys, "--bases"))) == without_digits(committed())


def test_the_matrix_keeps_what_it_promises():
    rows = {name: [cell.strip() for cell in row.strip("|").split("|")] for name, row in committed().items()}
    served = [cells for cells in rows.values() if cells[0] != "refused"]
    assert len(rows) >= 60 and len(served) >= 40
    assert all(cells[4:6] == ["yes", "yes"] for cells in served), "isolation, equality with eager"


def test_an_architecture_that_is_not_in_the_matrix(capsys):
    from l2v.errors import UserError

    with pytest.raises(UserError, match="'llamma' is not in the matrix"):
        doctor.main(["--bases", "llamma"])


def test_an_architecture_that_an_older_transformers_lacks(capsys, monkeypatch):
    from l2v.errors import UserError

    monkeypatch.setattr("l2v.doctor.bases.CONFIG_MAPPING", {"llama": None})
    with pytest.raises(UserError, match=r"transformers 5\.\S+ has no 'gte'; a newer one may"):
        doctor.main(["--bases", "gte"])
    assert re.search(r"Not in transformers 5\.\S+: .*gte", said(capsys, "--bases", "llama"))
