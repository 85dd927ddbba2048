"""What the benchmarks of the two losses, InfoNCE and cross-entropy of a head, share: steps, measuring, the table of ratios."""

from collections.abc import Callable, Sequence

import torch

from benchmarks.harness import Result, attempt, peak_memory, release
from benchmarks.pages import markdown

STEP = "forward+backward"
BARE = "bare_matmuls"
"""The provider that does a step's matmuls and nothing else."""


def loss_step(loss_of: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A step from inputs to the loss and the gradients of all inputs."""

    def step(*inputs):
        loss = loss_of(*inputs)
        return loss.detach(), *torch.autograd.grad(loss, inputs)

    return step


def prepare(
    results: Sequence[Result],
    make: Callable[[str], Callable],
    error_of: Callable[[Callable], float],
    sets: Sequence[tuple],
    device: torch.device,
) -> dict[str, list[Callable[[], object]]]:
    """The calls of every provider that works, one for each set of inputs; its error and its peak memory are measured.

    make: a provider's name -> its step. error_of: a step -> its relative error; not asked of bare matmuls.
    """
    calls = {}
    for result in results:
        with attempt(result):
            step = make(result.provider)
            if result.provider != BARE:
                result.error = error_of(step)
                result.memory = peak_memory(lambda s=step: s(*sets[0]), device)
            else:
                step(*sets[0])
            calls[result.provider] = [lambda x=x, s=step: s(*x) for x in sets]
        release(device)
    return calls


def by_workload(results: Sequence[Result]) -> dict[str, dict[str, Result]]:
    """Workload -> provider -> result."""
    found: dict[str, dict[str, Result]] = {}
    for x in results:
        found.setdefault(x.workload, {})[x.provider] = x
    return found


def comparison(results: Sequence[Result], peers: Sequence[str], floor: str, columns: Sequence[str] = ()) -> str:
    """Markdown, a row a workload: the op against its floors, and the peers' times over the op's.

    floor: what passes through memory, whose seconds are in facts["{floor}_s"]. columns: further facts to show.
    """
    rows = []
    for workload, found in by_workload(results).items():
        ours, bare, facts = found["l2v"].median, found[BARE].median, found["l2v"].facts
        memory = facts[f"{floor}_s"]
        row = [workload, *(str(facts[name]) for name in columns)]
        row += [f"{bare * 1e6:.0f}" if bare else "", f"{memory * 1e6:.0f}"]
        row += [f"{ours / bare:.2f}", f"{ours / (bare + memory):.2f}"] if ours and bare else ["", ""]
        for peer in (found[p] for p in peers):
            absent = "" if peer.skipped.startswith("Unavailable") else peer.skipped
            row.append(f"{peer.median / ours:.2f}" if ours and peer.median else absent)
        rows.append(row)
    head = ["workload", *columns, "bare us", f"{floor} us", "l2v / bare", f"l2v / (bare + {floor})"]
    return markdown(head + [f"{p} / l2v" for p in peers], rows)
