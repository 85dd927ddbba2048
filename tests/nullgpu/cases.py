"""What the suite runs: full-size steps of the recipe llama3-8b-da without trained weights, one process a rank."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RECIPE = "llama3-8b-da"
STAGES = ("mntp", "simcse", "supervised")
STEADY = 3
"""Launches and waits are counted in the last step of a short run; the first ones also compile and fill caches."""
FP8 = "base.base_precision=fp8"
LONG = 24
"""Steps of a run that shows growth, the allocator's reserve and the host's time."""


@dataclass(frozen=True)
class Case:
    """A training run. stage: None for all, in order. overrides: further KEY=VALUE of the command line.

    lines: recorded with the lines that asked for launches; without them the host's time is that of a real run.
    """

    name: str
    stage: str | None
    overrides: tuple[str, ...] = ()
    world: int = 1
    capability: int = 90
    steps: int = STEADY
    lines: bool = True

    @property
    def long(self) -> bool:
        """Whether memory, growth and the host's time are judged."""
        return self.steps >= LONG

    @property
    def deepspeeds_phases(self) -> tuple[str, ...]:
        """Phases in which DeepSpeed's own waits are counted against the budget; elsewhere none is allowed.

        ZeRO 3 waits for the weights of a layer that it gathers; the other stages for the norm of the gradients.
        """
        return ("forward", "backward", "update") if "zero.stage=3" in self.overrides else ("update",)

    def arguments(self, data: Path, out: Path) -> list[str]:
        """Of `l2v train`."""
        every = [f"steps={self.steps}", "log_every=1", "save_every=0"]
        stages = [self.stage] if self.stage else list(STAGES)
        found = [
            RECIPE,
            f"out={out}",
            "base.init=random",
            f"base.tokenizer={data / 'tokenizer'}",
            "tracking.tensorboard=false",
        ]
        found += [f"stages.mntp.data={data / 'documents.jsonl'}", "stages.mntp.eval_data=[]"]
        found += [f"stages.simcse.data={data / 'sentences.jsonl'}", f"stages.supervised.data={data / 'pairs.jsonl'}"]
        found += [f"stages.{stage}.{key}" for stage in stages for key in every]
        if self.stage in STAGES[1:]:
            found.append(f"stages.{self.stage}.from=base")
        if self.stage:
            found += ["--stage", self.stage]
        return [*found, *self.overrides]


def _suite() -> list[Case]:
    found = [Case(stage, stage) for stage in STAGES]
    # Two layers: with the full ones they give the launches of a layer.
    found += [Case(f"{stage}-2-layers", stage, ("base.overrides={num_hidden_layers: 2}",)) for stage in STAGES]
    found += [Case(f"{stage}-2-ranks", stage, world=2) for stage in STAGES]
    found += [Case(f"mntp-zero{zero}", "mntp", (f"zero.stage={zero}",)) for zero in (0, 2, 3)]
    found += [Case(f"{stage}-zero3", stage, ("zero.stage=3",)) for stage in STAGES[1:]]
    found += [Case(f"mntp-zero{zero}-2-ranks", "mntp", (f"zero.stage={zero}",), world=2) for zero in (0, 2, 3)]
    found += [Case(f"{stage}-fp8", stage, (FP8,)) for stage in STAGES]
    found += [Case("mntp-fp8-sm89", "mntp", (FP8,), capability=89)]
    found += [
        Case(f"{stage}-sm{capability}", stage, capability=capability) for capability in (80, 89) for stage in STAGES
    ]
    found += [Case("all-stages", None)]
    found += [Case(f"{stage}-long", stage, steps=LONG, lines=False) for stage in STAGES]
    return found


SUITE = {case.name: case for case in _suite()}
