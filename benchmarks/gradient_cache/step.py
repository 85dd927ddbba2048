"""One contrastive optimizer step on the real training path, and its peak memory; what bench.py measures.

python -m benchmarks.gradient_cache.step JSON     one measurement in its own process, its result the last line of stdout
"""

import ctypes
import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.harness import Unavailable, free_port

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("transformers", "peft", "accelerate", "safetensors", "deepspeed")


@dataclass(frozen=True)
class Shape:
    """A Llama without weights, and how much of it one micro-batch holds: `examples` pairs of texts of `length` tokens."""

    hidden: int
    layers: int
    heads: int
    key_heads: int
    ffn: int
    vocabulary: int
    examples: int
    length: int

    def config(self) -> dict:
        """As `base.config` of a recipe has it."""
        return {
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "max_position_embeddings": 4 * self.length,
            "tie_word_embeddings": False,
        }


SHAPES = {
    "tiny": Shape(128, 4, 4, 2, 384, 512, examples=8, length=48),
    "small": Shape(256, 4, 4, 2, 768, 2048, examples=8, length=64),
    "50m": Shape(512, 12, 8, 4, 2048, 8192, examples=8, length=64),
    "1b": Shape(2048, 16, 32, 8, 8192, 128256, examples=64, length=64),
    "8b": Shape(4096, 32, 32, 8, 14336, 128256, examples=64, length=128),
}
"""In the three small ones a micro-batch's activations are several times the weights, so that memory shows what it holds."""


@dataclass(frozen=True)
class Setting:
    """One measurement: a batch of `micros` micro-batches of `examples` pairs each; more than one takes the cache."""

    model: str
    micros: int
    examples: int
    recompute: bool = False

    @property
    def batch(self) -> int:
        return self.micros * self.examples

    @property
    def tokens(self) -> int:
        return 2 * self.batch * SHAPES[self.model].length

    @property
    def embeddings(self) -> int:
        """Bytes of all embeddings of the batch, in fp32."""
        return 2 * self.batch * SHAPES[self.model].hidden * 4


def check_installed() -> None:
    """Raises: Unavailable with one sentence that names what is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Unavailable(f"the training step needs {', '.join(missing)}: install l2v, or put them on PYTHONPATH")


class TrainingStep:
    """A model, its LoRA and its engine as `l2v train` builds them, for any number of settings one after another."""

    def __init__(self, model: str, dtype: torch.dtype) -> None:
        from l2v.model.load import load_model
        from l2v.model.lora import add_lora
        from l2v.model.packed import PackedDecoder
        from l2v.recipe import Base, Source, Supervised, Zero
        from l2v.training.engine import deepspeed_config, initialize, start_distributed

        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone | {"MASTER_PORT": str(free_port())})
        start_distributed()
        self.shape = SHAPES[model]
        base = Base(model=model, init="random", config=self.shape.config())
        self.stage = Supervised(data=[Source("none")], batch=self.shape.examples, steps=1, lr=1e-4)
        inner = load_model(base, head=False, dtype=dtype)
        decoder = add_lora(inner, self.stage.lora, base_name=model, seed=0)
        self.packed = PackedDecoder(decoder, backend=base.backend, pooling=base.pooling)
        count = sum(p.numel() for p in self.packed.parameters() if p.requires_grad)
        self.engine = initialize(self.packed, deepspeed_config(self.stage, Zero(), dtype, count), self.stage)
        self.engine.train()

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def prepare(self, setting: Setting) -> Callable[[], None]:
        """A callable that runs one optimizer step; its data is made here."""
        from l2v.training.steps import StepCounts, contrastive_step

        unit = [self._micro(at, setting.examples) for at in range(setting.micros)]

        def step() -> None:
            self.packed.set_recompute("layer" if setting.recompute else "none")
            contrastive_step(self.engine, [unit], self.stage, StepCounts([setting.batch], [setting.batch]))
            self.engine.step()

        return step

    def _micro(self, at: int, examples: int):
        from l2v.batch import Segment, pack

        ids = torch.randint(self.shape.vocabulary, (examples, 2, self.shape.length)).numpy()
        segments = [
            Segment(ids[i, column], example=at * examples + i, column=column, text_key=2 * (at * examples + i) + column)
            for i in range(examples)
            for column in range(2)
        ]
        return pack(segments, step=at)


def times_on_cpu(setting: Setting, rounds: int) -> list[float]:
    """Seconds of `rounds` steps, in its own process. Raises: RuntimeError with the end of its output."""
    return _ask(setting, rounds, {})["times"]


def memory_on_cpu(setting: Setting) -> int:
    """Peak resident bytes of a step beyond what was resident before, measured in its own process.

    Its own, because memory that an earlier setting left in allocators would hide what this one needs.
    Raises: RuntimeError with the end of its output, Unavailable without Linux's /proc/self/clear_refs.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        raise Unavailable("peak resident memory needs Linux's /proc/self/clear_refs")
    # Tensors get their own pages, and a freed tensor gives them back at once: what is resident is what is alive. It
    # costs half of the speed, so times come from another process.
    thresholds = {f"MALLOC_{name}_THRESHOLD_": str(8 << 10) for name in ("MMAP", "TRIM")}
    return _ask(setting, 0, thresholds | {"MALLOC_MMAP_MAX_": "60000"})["peak"]


def _ask(setting, rounds, settings_of_malloc):
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} | settings_of_malloc
    path = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    question = json.dumps(asdict(setting) | {"rounds": rounds})
    command = [sys.executable, "-m", "benchmarks.gradient_cache.step", question]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{setting}: {(done.stderr or done.stdout)[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _answer(setting, rounds):
    torch.manual_seed(0)
    step = TrainingStep(setting.model, torch.float32).prepare(setting)
    # The first step makes what stays: optimizer state, gradient buffers, the libraries' own caches.
    step()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    if rounds:
        return {"times": times}
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    resident = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    step()
    return {"peak": _status("VmHWM") - resident}


def _status(name):
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    n_rounds = given.pop("rounds")
    print(json.dumps(_answer(Setting(**given), n_rounds)), flush=True)
