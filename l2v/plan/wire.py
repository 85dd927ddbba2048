"""Communication in a step: every collective with its bytes, and its time on a given number of GPUs.

Taken from the source of DeepSpeed 0.19 and this trainer, and checked against the bytes of real runs
(tests/launch/test_wire.py). Nothing overlaps (`overlap_comm: false`). Not counted: flags and counts of a few bytes, and
padding of fewer elements per tensor than there are ranks.

Time of a collective: the better of a ring (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms") and, for an
all-reduce between nodes, a double binary tree (Sanders, Speck and Traeff 2009, "Two-tree algorithms for full bandwidth
broadcast, reduction and scan"), with the latencies that NCCL itself uses to choose between them (src/graph/tuning.cc).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from l2v.plan.gpus import LINK_EFFICIENCY, Gpu
from l2v.plan.memory import Model
from l2v.plan.work import Share
from l2v.recipe import Contrastive, Mntp, Stage

Op = Literal["all-reduce", "all-gather", "reduce-scatter"]

RING_START, RING_HOP, RING_NET_HOP = 8.4e-6, 3.4e-6, 9.6e-6
"""Seconds to start a ring, for one hop within a node, and for one hop between nodes."""
TREE_START, TREE_HOP, TREE_NET_HOP = 4.4e-6, 1.2e-6, 8.5e-6
TREE_SHARE = 0.9 * 0.915
"""Share of the ring's bandwidth that a tree reaches."""
MAX_PERSISTENT_ELEMENTS = 100_000
"""DeepSpeed's default `stage3_param_persistence_threshold`: weights of at most so many elements stay on every rank."""
ALLGATHER_BUCKET = 500_000_000
"""DeepSpeed's default `allgather_bucket_size`, in elements."""
WITH_QUERIES = {"query_to_query", "doc_to_query"}


@dataclass(frozen=True)
class Transfer:
    """One kind of collective in a step. times: number of collectives. bytes: of the full tensors, summed over all of them."""

    what: str
    op: Op
    bytes: int
    times: int

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends (and receives) in a ring."""
        return (2 if self.op == "all-reduce" else 1) * (ranks - 1) / ranks * self.bytes


def transfers(
    model: Model, stage: Stage, zero: Mapping[str, Any], itemsize: int, ranks: int, share: Share
) -> list[Transfer]:
    """The collectives of a step; empty for one rank.

    zero: DeepSpeed's `zero_optimization`. itemsize: bytes of a weight. share: the work of the busiest rank.
    """
    if ranks == 1:
        return []
    found = _embeddings(stage, model.shape.hidden, ranks, share)
    which, trained = zero["stage"], model.trainable
    backwards, bucket = share.micros, zero.get("reduce_bucket_size", trained)
    if which == 3:
        found += _weights(model, stage, zero, itemsize, share)
        pieces = backwards * math.ceil(trained / bucket)
        found.append(Transfer("gradients", "reduce-scatter", 4 * trained * backwards, pieces))
        return found
    times = backwards if which == 2 else 1  # ZeRO-2 reduces gradients after every micro-batch
    found.append(Transfer("gradients", "all-reduce", 4 * trained * times, times * math.ceil(trained / bucket)))
    if which:
        pieces = math.ceil(trained / zero.get("allgather_bucket_size", ALLGATHER_BUCKET))
        what = "updated weights" if model.trained_all else "updated adapters"
        found.append(Transfer(what, "all-gather", itemsize * trained, pieces))
    return found


def _embeddings(stage: Stage, hidden: int, ranks: int, share: Share) -> list[Transfer]:
    """Rows in fp32, padded to the rank with the most, and their gradients; with `negatives: global` labels too."""
    if not isinstance(stage, Contrastive):
        return []
    queried = stage.negatives == "global" and bool(WITH_QUERIES & set(stage.directions))
    owned = stage.hard_negatives == "own" or "doc_to_doc" in stage.directions
    parts = 2 if queried else 1
    rows = ranks * sum(c + (q if queried else 0) for c, q in share.gathered)
    found = [
        Transfer("embeddings", "all-gather", rows * hidden * 4, parts * len(share.gathered)),
        Transfer("gradients of embeddings", "reduce-scatter", rows * hidden * 4, parts * len(share.gathered)),
    ]
    if stage.negatives == "micro":  # every rank reads the labels of its groups from the data
        return found
    ids = 3 * stage.mask_duplicates + stage.grouped  # ids of each text; texts with an equal id are not negatives
    keys = [ids * (c + q * queried) + 2 * c * owned for c, q in share.gathered]
    return found + [Transfer("labels", "all-gather", 8 * ranks * sum(keys), len(keys))] * bool(sum(keys))


def _weights(model: Model, stage: Stage, zero: Mapping[str, Any], itemsize: int, share: Share) -> list[Transfer]:
    """ZeRO-3: a layer's weights are gathered for its forward and again for its backward, including recomputation.

    DeepSpeed keeps weights that are used again soon (`stage3_max_reuse_distance`), a layer or two between forward and
    backward; they are counted here nevertheless. The embedding's backward needs no weights. The first pass of a gradient
    cache gathers the weights too.
    """
    shape, small = model.shape, zero.get("stage3_param_persistence_threshold", MAX_PERSISTENT_ELEMENTS)
    linears = [shape.inputs[name] * shape.outputs[name] for name in shape.inputs]
    adapters = [shape.rank * width for name in shape.adapted for width in (shape.inputs[name], shape.outputs[name])]
    layer = [*linears, *adapters, shape.hidden, shape.hidden]
    end = [shape.hidden] + ([model.vocabulary * shape.hidden] if isinstance(stage, Mntp) and not model.tied else [])
    embedding = [model.vocabulary * shape.hidden]

    def large(sizes: Iterable[int]) -> list[int]:
        return [size for size in sizes if size > small]

    backwards = share.micros
    forwards = backwards + (sum(len(unit) - 1 for unit in share.units) if isinstance(stage, Contrastive) else 0)
    inner = itemsize * (shape.layers * sum(large(layer)) + sum(large(end)))
    units = shape.layers * bool(large(layer)) + len(large(end))
    found = [
        Transfer(
            "weights, forward", "all-gather", forwards * (inner + itemsize * sum(large(embedding))),
            forwards * (units + len(large(embedding))),
        ),
        Transfer("weights, backward", "all-gather", backwards * inner, backwards * units),
    ]  # fmt: skip
    stay = [size for size in [*layer * shape.layers, *end, *embedding] if size <= small]
    return found + [Transfer("small weights, updated", "all-gather", itemsize * sum(stay), len(stay))] * bool(stay)


def seconds(transfer: Transfer, ranks: int, per_node: int, gpu: Gpu) -> float:
    """Seconds that the collectives of a transfer take, one after another."""
    if ranks == 1 or not transfer.times:
        return 0.0
    nodes = math.ceil(ranks / per_node)
    # A ring passes each node's port once, with everything that a rank sends.
    rate = gpu.link if nodes == 1 else min(gpu.link, LINK_EFFICIENCY * gpu.network)
    rounds = 2 if transfer.op == "all-reduce" else 1
    between = nodes - 1
    hops = rounds * ((ranks - 1 - between) * RING_HOP + between * RING_NET_HOP)
    ring = transfer.times * (RING_START + hops) + transfer.sent(ranks) / rate
    if transfer.op != "all-reduce" or nodes == 1:
        return ring
    climb = 2 * ((min(ranks, per_node) - 1) * TREE_HOP + math.log2(nodes) * TREE_NET_HOP)
    tree = transfer.times * (TREE_START + climb) + 2 * transfer.bytes / (TREE_SHARE * rate)
    return min(ring, tree)


def all_seconds(found: Sequence[Transfer], ranks: int, per_node: int, gpu: Gpu) -> float:
    """Seconds of all transfers of a step."""
    return sum(seconds(transfer, ranks, per_node, gpu) for transfer in found)
