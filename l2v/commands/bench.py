"""`l2v bench NAME [--quick]`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Sequence

from l2v.commands.parser import new_parser
from l2v.errors import RecipeError, UserError

BENCHMARKS = {
    "attention": "kernels.attention",
    "contrastive": "kernels.contrastive",
    "linear_cross_entropy": "kernels.linear_cross_entropy",
    "step_ops": "kernels.step_ops",
    "fused_layer": "kernels.fused_layer",
    "fused_model": "kernels.fused_model",
    "fp8": "fp8.kernels",
    "fp8_parity": "fp8.parity",
    "gradient_cache": "gradient_cache.bench",
    "train_step": "train_step.bench",
    "encode": "encode",
    "serve": "serve",
    "data_build": "data.build",
    "kills": "faults.kills",
}
"""Benchmark name to module in a checkout's benchmarks/ folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark of a checkout's benchmarks/ folder; results on a CPU are marked as such."""
    argv = list(argv or ())
    if not argv or argv[0] in ("-h", "--help"):
        parser().print_help()
        return 0
    if argv[0] not in BENCHMARKS:
        raise RecipeError(f"l2v bench has no benchmark '{argv[0]}'; choose one of {', '.join(BENCHMARKS)}")
    if importlib.util.find_spec("benchmarks") is None:
        raise UserError(
            "the benchmarks are part of a checkout, not of the wheel: run this from a clone of the repository"
        )
    return importlib.import_module(f"benchmarks.{BENCHMARKS[argv[0]]}").main(argv[1:]) or 0


def parser() -> argparse.ArgumentParser:
    """The arguments of `l2v bench`; each benchmark has more."""
    p = new_parser(
        "bench", "Run a benchmark of a checkout; results name the device they were measured on.", "attention --quick"
    )
    p.add_argument("name", metavar="NAME", choices=BENCHMARKS, help=", ".join(BENCHMARKS))
    p.add_argument(
        "--quick", action="store_true", help="small shapes, a minute or two; `l2v bench NAME --help` lists more"
    )
    return p
