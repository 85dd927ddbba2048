"""What a benchmark declares, and the one main function that parses, runs, prints and writes.

`Benchmark` takes a run function. `Comparison` is for ops: it declares its parts, and what becomes of their results is the
same for all.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Ceilings, Result, Target, Unavailable, device_facts, measure_ceilings, release
from benchmarks.pages import SMOKE, Panel, bars, headline, table, targets_table, tflops_panels, write
from l2v.errors import UserError
from l2v.machine import check_results_folder


@dataclass(frozen=True, kw_only=True)
class Command:
    """The name in `l2v bench NAME`, which its files have too, and the options of the command line.

    What derives from it has a `run`, from the options to the exit code.
    """

    name: str
    doc: str
    """Of the module; the first line describes the benchmark in --help."""
    quick: str
    """What --quick does."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Further arguments: name -> what `add_argument` takes."""
    any_device: bool = True
    """Whether there is a --device; options.device is then a torch.device."""

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Returns the exit code: 0, or 1 where the benchmark failed, its own code was wrong, or something is missing."""
        parser = argparse.ArgumentParser(prog=f"l2v bench {self.name}", description=self.doc.split("\n")[0])
        parser.add_argument("--quick", action="store_true", help=self.quick)
        parser.add_argument(
            "--out", type=Path, help=f"folder for {self.name}.json, .md and, if there is a figure, .png"
        )
        if self.any_device:
            parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        for name, settings in self.options.items():
            parser.add_argument(name, **settings)
        options = parser.parse_intermixed_args(argv)
        if self.any_device:
            options.device = torch.empty(0, device=options.device).device
        try:
            if options.out:
                _check_out(options.out)
            return self.run(options)
        except Unavailable as error:
            print(f"{self.name}: {error}", file=sys.stderr)
            return 1


def _check_out(folder: Path) -> None:
    """Raises: Unavailable where numbers of the null GPU would come among those of hardware."""
    try:
        check_results_folder(folder)
    except UserError as error:
        raise Unavailable(str(error)) from None


@dataclass(frozen=True, kw_only=True)
class Benchmark(Command):
    """A benchmark with its own run function."""

    run: Callable[[argparse.Namespace], int]
    """From the options to the exit code; may raise Unavailable."""


@dataclass(frozen=True)
class Setup:
    """What the parts of a comparison are made from."""

    options: argparse.Namespace
    facts: dict
    ceilings: Ceilings

    @property
    def device(self) -> torch.device:
        return self.options.device

    @property
    def quick(self) -> bool:
        return self.options.quick

    @property
    def smoke(self) -> bool:
        return self.facts["smoke"]

    def seconds(self, quick: float, full: float, smoke: float = 0.02) -> float:
        """How long a workload is timed."""
        return smoke if self.smoke else quick if self.quick else full


def _page(results: list[Result], found: list[Target], facts: dict) -> str:
    text = f"{headline(facts)}\n\n{table(results)}"
    return f"{text}\n\n{targets_table(found)}" if found else text


def _no_facts(device: torch.device) -> dict:
    return {}


def _panels(results: list[Result], label: str) -> list[Panel]:
    return tflops_panels(results, lambda x: x.direction + label)


@dataclass(frozen=True, kw_only=True)
class Comparison(Command):
    """Providers of an op, on workloads one after another.

    After each part its table is printed, and all that was measured so far is written: a run that is cut short keeps it.
    """

    parts: Callable[[Setup], Iterable[Callable[[], list[Result]]]]
    """A call for each workload."""
    targets: Callable[[list[Result], bool], list[Target]] | None = None
    """From results, and whether they are a smoke test's."""
    page: Callable[[list[Result], list[Target], dict], str] = _page
    panels: Callable[[list[Result], str], list[Panel]] = _panels
    """From results, and what to add to titles."""
    table: Callable[[list[Result]], str] = table
    ours: tuple[str, ...] = ("l2v",)
    """What begins the names of providers that must not fail."""
    packages: tuple[str, ...] = ()
    """Whose versions are recorded, beyond those that always are."""
    facts: Callable[[torch.device], dict] = _no_facts

    def run(self, options: argparse.Namespace) -> int:
        torch.manual_seed(0)
        facts = device_facts(options.device, self.packages) | self.facts(options.device)
        setup = Setup(options, facts, measure_ceilings(options.device))
        if setup.smoke:
            print(SMOKE)
        results: list[Result] = []
        for part in self.parts(setup):
            new = part()
            results += new
            release(options.device)
            print(self.table(new), flush=True)
            if options.out:
                self._write(setup, results)
        if self.targets:
            print(targets_table(self.targets(results, setup.smoke)))
        own = (x for x in results if x.provider.startswith(self.ours))
        return int(any(x.median is None and x.facts.get("failed", True) for x in own))

    def _write(self, setup: Setup, results: list[Result]) -> None:
        found = self.targets(results, setup.smoke) if self.targets else []
        data = {"facts": setup.facts, "ceilings": asdict(setup.ceilings)}
        data |= {"targets": [x.row() for x in found]} if self.targets else {}
        data["results"] = [asdict(x) for x in results]
        panels = self.panels(results, " (CPU smoke test)" if setup.smoke else "")
        figure = (lambda: bars(panels)) if panels else None
        write(setup.options.out, self.name, data, self.page(results, found, setup.facts), figure)
