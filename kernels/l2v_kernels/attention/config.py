"""Tile shapes and launch parameters: defaults for each architecture, and the candidates of a search.

Every default is the first of a list of candidates, larger tiles first, that compiles without register spills and within
shared memory, with and without dropout (tests/kernels/test_compile.py checks all of them). `L2V_AUTOTUNE=1` finds the
fastest on the device.
"""

from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "query", "key"]


@dataclass(frozen=True)
class Config:
    """block_m rows (query token, query head) by block_n keys a step, with Triton's warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False
    """Whether q, k, v and do come through tensor descriptors (sm_90 and later, no dropout)."""

    def meta(self) -> dict[str, int]:
        """As keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "TMA": self.tma,
        }


# [architecture][kind][head dimension, rounded up] = (short segments, long segments), each (m, n, warps, stages)
# Chosen to compile without spills under Triton 3.6.0, 3.7.1 and 3.9.0 alike; each allocates registers its own way. 8.6 and 8.9
# take the tiles of 12.0 and have other registers: with a stage more, three short tiles and the long key gradient spill there.
_HALF = {
    80: {
        "forward": {
            64: ((64, 32, 4, 3), (128, 64, 8, 3)),
            128: ((64, 32, 4, 3), (64, 64, 8, 2)),
            256: ((64, 16, 8, 2), (64, 64, 8, 1)),
        },
        "query": {
            64: ((64, 32, 4, 3), (64, 32, 4, 2)),
            128: ((64, 32, 4, 1), (64, 64, 8, 2)),
            256: ((64, 32, 8, 2), (64, 32, 8, 2)),
        },
        "key": {
            64: ((32, 64, 4, 1), (32, 64, 4, 1)),
            128: ((32, 32, 4, 2), (64, 64, 8, 2)),
            256: ((32, 32, 8, 2), (32, 32, 8, 2)),
        },
    },
    90: {
        "forward": {
            64: ((64, 32, 4, 3), (128, 64, 8, 3)),
            128: ((64, 32, 4, 3), (128, 64, 8, 3)),
            256: ((64, 32, 8, 2), (128, 32, 8, 2)),
        },
        "query": {
            64: ((64, 32, 4, 3), (128, 64, 8, 3)),
            128: ((64, 32, 4, 2), (128, 64, 8, 2)),
            256: ((32, 32, 4, 1), (64, 16, 8, 2)),
        },
        "key": {
            64: ((32, 64, 4, 2), (32, 128, 8, 2)),
            128: ((16, 64, 4, 1), (32, 128, 8, 1)),
            256: ((32, 32, 8, 2), (32, 32, 8, 2)),
        },
    },
    100: {
        "forward": {
            64: ((64, 32, 4, 3), (128, 64, 8, 3)),
            128: ((64, 32, 4, 3), (128, 64, 8, 3)),
            256: ((64, 64, 8, 2), (64, 64, 8, 2)),
        },
        "query": {
            64: ((64, 32, 4, 3), (128, 64, 8, 3)),
            128: ((64, 32, 4, 2), (128, 32, 8, 2)),
            256: ((64, 32, 8, 1), (64, 32, 8, 1)),
        },
        "key": {
            64: ((32, 64, 4, 2), (64, 64, 4, 2)),
            128: ((32, 64, 4, 2), (64, 128, 8, 2)),
            256: ((32, 64, 8, 2), (32, 64, 8, 2)),
        },
    },
    120: {
        "forward": {
            64: ((64, 32, 4, 3), (128, 64, 8, 3)),
            128: ((64, 32, 4, 2), (64, 64, 4, 2)),
            256: ((64, 32, 8, 2), (64, 32, 8, 2)),
        },
        "query": {
            64: ((64, 32, 4, 2), (64, 32, 4, 2)),
            128: ((64, 32, 4, 2), (64, 64, 8, 2)),
            256: ((64, 32, 8, 1), (64, 32, 8, 1)),
        },
        "key": {
            64: ((32, 64, 4, 1), (32, 64, 4, 1)),
            128: ((32, 32, 4, 2), (64, 64, 8, 1)),
            256: ((32, 32, 8, 2), (32, 32, 8, 2)),
        },
    },
}
# Head dimensions between 64 and 128 are padded to 128 behind a mask, at the cost of registers: tiles where 128 spills.
_MASKED = {
    (80, "key"): ((32, 32, 4, 2), (32, 32, 4, 2)),
    (90, "query"): ((64, 32, 4, 2), (128, 32, 8, 2)),
    (100, "query"): ((64, 32, 4, 2), (64, 32, 4, 2)),
    (120, "forward"): ((64, 32, 8, 2), (64, 64, 4, 2)),
}
# Without dropout, softcap, causality and windows a tile needs fewer registers, and on sm_90 and later q, k, v and do come
# through tensor descriptors (fifth number: True). Chosen by issue slots over tensor-core clocks among what does not spill
# (`python -m benchmarks.resources --issue`), for short, medium and long segments: two small blocks on an SM waste less on a
# segment of 128 tokens. What is not listed takes the tiles above.
_PLAIN: dict[int, dict[Kind, dict[int, tuple[tuple, tuple, tuple]]]] = {
    80: {"forward": {128: ((64, 32, 4, 3), (128, 64, 8, 2), (128, 64, 8, 2))}},
    90: {
        "forward": {
            64: ((64, 32, 4, 2, True), (64, 64, 4, 2, True), (128, 128, 8, 3, True)),
            128: ((64, 32, 4, 2, True), (64, 64, 4, 2, True), (128, 128, 8, 3, True)),
        },
        "query": {
            64: ((64, 32, 4, 3), (64, 64, 4, 2, True), (128, 128, 8, 2, True)),
            128: ((64, 32, 4, 2), (64, 64, 4, 2, True), (128, 64, 8, 2, True)),
        },
        "key": {
            64: ((32, 64, 4, 2, True), (32, 64, 4, 2, True), (64, 128, 8, 2, True)),
            128: ((32, 64, 4, 2, True), (32, 64, 4, 2, True), (64, 128, 8, 2, True)),
        },
    },
    100: {
        "forward": {128: ((64, 32, 4, 3), (128, 128, 8, 2, True), (128, 128, 8, 2, True))},
        "query": {128: ((64, 32, 4, 2), (128, 128, 8, 2, True), (128, 128, 8, 2, True))},
    },
    120: {
        "forward": {128: ((64, 32, 4, 2), (128, 64, 8, 2), (128, 64, 8, 2))},
        "query": {128: ((64, 32, 4, 2), (128, 32, 8, 2), (128, 32, 8, 2))},
    },
}
# The key gradient of 64 x 128 fits the registers only if 4 query heads share a tile; with fewer a descriptor cannot carry
# lse and delta either.
_OTHER_GROUPS = (32, 128, 8, 2, True)
# A window and dropout together take registers that the tile above does not leave (Gemma 3 in a SimCSE stage).
_WINDOW_AND_DROPOUT = {(80, "forward", 256): ((64, 16, 8, 2), (64, 16, 8, 3))}
# fp32 matmuls run on the CUDA cores, the same on every architecture. Every tile tried for the query gradient of a head
# dimension above 128 spills.
_SINGLE = {
    "forward": {64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
    "query": {64: (32, 16, 4, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    "key": {64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
}

ARCHITECTURES = tuple(_HALF)


def is_short(mean_length: float, group: int) -> bool:
    """Whether a tile of 128 rows would mostly hold keys that a row may not see."""
    return mean_length < max(64, 256 // group)


def is_medium(mean_length: float) -> bool:
    """Whether segments are so short that small tiles waste less than large ones gain."""
    return mean_length < 256


def default(
    kind: Kind,
    arch: int,
    head_dim: int,
    itemsize: int,
    short: bool,
    plain: bool = False,
    tma: bool = False,
    group: int = 4,
    medium: bool = False,
    window_and_dropout: bool = False,
) -> Config:
    """The configuration without a search.

    arch: one of ARCHITECTURES; itemsize: bytes an element; short: the answer of `is_short`; plain: no dropout, softcap,
    causality or window; tma: tensor descriptors can describe the tensors; group: how many query heads share a tile; medium: the
    answer of `is_medium`, which matters to plain launches alone; window_and_dropout: whether both are compiled in.
    """
    block_d = _padded(head_dim)
    if itemsize == 4:
        return Config(*_SINGLE[kind][block_d])
    found = _PLAIN[arch].get(kind, {}).get(block_d) if plain else None
    if found is not None:
        config = Config(*found[0 if short else 1 if medium else 2])
        if (
            config == Config(64, 128, 8, 2, True)
            and kind == "key"
            and _padded(head_dim) > 64
            and group != 4
            and arch == 90
        ):
            config = Config(*_OTHER_GROUPS)
        # A head dimension behind a mask takes registers; a descriptor needs no mask.
        if tma if config.tma else not 64 < head_dim < 128:
            return config
    shapes = _HALF[arch][kind][block_d]
    if window_and_dropout:
        shapes = _WINDOW_AND_DROPOUT.get((arch, kind, block_d), shapes)
    if 64 < head_dim < 128:
        shapes = _MASKED.get((arch, kind), shapes)
    return Config(*shapes[0 if short else 1])


def candidates(
    kind: Kind, arch: int, head_dim: int, itemsize: int, plain: bool = False, tma: bool = False
) -> list[Config]:
    """What a search tries: the defaults of all architectures and kinds of segments, this architecture's first, and
    those with one pipeline stage more or less. Some may spill and lose, or not fit and be skipped."""
    block_d = _padded(head_dim)
    if itemsize == 4:
        shapes = [_SINGLE[kind][block_d], (16, 32, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 16, 1)]
        return [Config(*shape) for shape in dict.fromkeys(shapes)]
    shapes = list(_MASKED.get((arch, kind), ())) if 64 < head_dim < 128 else []
    shapes += [shape for name in (arch, *ARCHITECTURES) for shape in _HALF[name][kind][block_d]]
    shapes += (
        [(64, 64, 4, 2), (128, 32, 8, 2), (128, 128, 8, 2)] if kind != "key" else [(64, 64, 4, 2), (64, 128, 8, 2)]
    )
    shapes += [(m, n, warps, stages + more) for m, n, warps, stages in shapes for more in (-1, 1) if stages + more > 0]
    if plain:
        own = [shape for name in (arch, *ARCHITECTURES) for shape in _PLAIN[name].get(kind, {}).get(block_d, ())]
        own += [_OTHER_GROUPS] if kind == "key" else [(128, 64, 8, 3, True)]
        shapes = [shape for shape in own if tma or len(shape) < 5] + shapes
    return [Config(*shape) for shape in dict.fromkeys(shapes)]


def _padded(head_dim):
    return 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
