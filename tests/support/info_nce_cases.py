"""What the tests of InfoNCE share: random problems with every option, and a float64 ground truth."""

import math

import torch
from hypothesis import strategies as st

from l2v_kernels import info_nce
from l2v_kernels.info_nce.reference import info_nce_reference
from l2v_kernels.info_nce.settings import DIRECTIONS, Labels, Settings

VARIANTS = {
    "plain": {},
    "duplicates": {"ids": 1},
    "two kinds of ids": {"ids": 2},
    "hard negatives of their own": {"owners": True, "restricted": True},
    "margin": {"margin": 0.05},
    "symmetric": {"directions": DIRECTIONS[::2], "partition": "per_direction"},
    "symmetric joint": {"directions": DIRECTIONS[::2]},
    "gte": {"directions": DIRECTIONS, "owners": True},
    "matryoshka": {"prefixes": (3, 8, 17)},
    "int8": {"quantize": "int8", "ids": 1},
    "binary": {"quantize": "binary", "directions": DIRECTIONS, "owners": True, "prefixes": (3, 8, 16)},
    "a share of all queries": {"directions": DIRECTIONS, "share": True, "owners": True},
    "everything": {
        "directions": DIRECTIONS, "ids": 2, "owners": True, "restricted": True, "margin": 0.1, "prefixes": (2, 9, 16),
        "share": True, "weights": True, "quantize": "int8",
    },
}  # fmt: skip
"""Arguments of `problem` by name; E is 17 or more."""


def problem(
    N, M, E, *, seed=0, dtype=torch.float32, scale=20.0, ids=0, owners=False, restricted=False, margin=None,
    directions=("query_to_doc",), partition="joint", prefixes=None, share=False, weights=False, quantize=None,
    device="cpu",
):  # fmt: skip
    """(tensors, keyword arguments of `info_nce`). tensors: queries, candidates and, for a share, all queries.

    Every query has one positive of its own where M allows it; the other candidates are somebody's hard negatives.
    """
    g = torch.Generator().manual_seed(seed)
    Q = N + 3 if share else N
    offset = 2 if share else 0
    # Related texts, of different lengths, so that losses are neither zero nor those of noise.
    base = torch.randn(max(Q, M), E, generator=g)
    everyone = base[:Q] + 0.7 * torch.randn(Q, E, generator=g)
    candidates = (base[torch.arange(M) % Q] + 0.7 * torch.randn(M, E, generator=g)) * torch.rand(M, 1, generator=g).add(
        0.5
    )
    queries = everyone[offset : offset + N]
    targets = (torch.arange(N) + offset) % M
    chosen = {"scale": scale, "directions": tuple(directions), "partition": partition, "query_offset": offset}
    if ids:
        candidate_ids = torch.randint(-1, max(2, M // 2), (M, ids), generator=g)
        all_ids = candidate_ids[(torch.arange(Q)) % M]
        chosen |= {"candidate_ids": candidate_ids.to(device), "query_ids": all_ids[offset : offset + N].to(device)}
        if share:
            chosen["all_query_ids"] = all_ids.to(device)
    if owners:
        chosen["owners_M"] = torch.where(torch.rand(M, generator=g) < 0.9, torch.arange(M) % Q, -1).to(device)
    if restricted:
        chosen["restricted_M"] = (torch.arange(M) >= Q).to(device)
    if margin is not None:
        chosen["false_negative_margin"] = margin
    if prefixes is not None:
        chosen |= {"prefixes": prefixes, "prefix_weights": [1 / (1 + p) for p in range(len(prefixes))]}
    if quantize is not None:
        chosen["quantize"] = quantize
    if weights:
        chosen["weights_N"] = torch.rand(N, generator=g).to(device)
    tensors = [x.to(device, dtype) for x in (queries, candidates, *([everyone] if share else []))]
    return tensors, targets.to(device), chosen


def ours(tensors, targets, chosen, **more):
    """[loss, gradients of the tensors, of scale and of weights where there are], float64."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    chosen = dict(chosen, **more)
    scale = torch.tensor(chosen.pop("scale"), requires_grad=True, device=leaves[0].device)
    weights = chosen.pop("weights_N", None)
    extra = [scale]
    if weights is not None:
        weights = weights.clone().requires_grad_()
        extra.append(weights)
    if len(leaves) == 3:
        chosen["all_queries_QE"] = leaves[2]
    loss = info_nce(*leaves[:2], targets, scale=scale, weights_N=weights, **chosen)
    loss.backward()
    assert loss.dtype == (torch.float64 if tensors[0].dtype == torch.float64 else torch.float32)
    assert all(x.grad.dtype == x.dtype for x in leaves)
    return [loss.detach().double(), *(x.grad.double() for x in (*leaves, *extra))]


def plain(tensors, targets, chosen, dtype=torch.float64):
    """The same of the reference, computed in dtype."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    scale = torch.tensor(chosen["scale"], dtype=dtype, requires_grad=True, device=leaves[0].device)
    E, extra = tensors[0].shape[1], [scale]
    prefixes = chosen.get("prefixes", (E,))
    settings = Settings(
        tuple(d for d in DIRECTIONS if d in chosen["directions"]), chosen["partition"] == "joint",
        chosen.get("false_negative_margin"), tuple(prefixes), chosen["query_offset"], 0,
        quantize=chosen.get("quantize"),
    )  # fmt: skip
    ids = chosen.get("query_ids"), chosen.get("candidate_ids"), chosen.get("all_query_ids", chosen.get("query_ids"))
    labels = Labels(targets, *ids, chosen.get("owners_M"), chosen.get("restricted_M"))
    losses_PN = info_nce_reference(leaves[0], leaves[1], leaves[-1 if len(leaves) == 3 else 0], labels, scale, settings)
    weights_P = torch.tensor(chosen.get("prefix_weights", [1.0] * len(prefixes)), dtype=dtype, device=losses_PN.device)
    losses_N = weights_P @ losses_PN
    weights = chosen.get("weights_N")
    if weights is None:
        loss = losses_N.mean()
    else:
        weights = weights.detach().to(dtype).requires_grad_()
        extra.append(weights)
        loss = (weights * losses_N).sum() / weights.sum()
    loss.backward()
    # A side that no direction reads gets none.
    return [
        loss.detach().double(),
        *(torch.zeros_like(x) if x.grad is None else x.grad.double() for x in (*leaves, *extra)),
    ]


def least_loss(chosen) -> float:
    """What the loss cannot fall below: where both directions of a pair share a softmax, it is counted twice, ln 2."""
    joint = {"query_to_doc", "doc_to_query"} <= set(chosen["directions"]) and chosen["partition"] == "joint"
    return math.log(2) * sum(chosen.get("prefix_weights", [1.0])) if joint else 0.0


def rounding(want, tensors, targets, chosen) -> list[float]:
    """The error of plain PyTorch in the dtype of the problem, of each number; in fp32 the largest of nine.

    Eight of them are of rows that are longer by random factors, whose gradients are shorter by the same and whose cosines
    are the same: another rounding of one problem, so that the luck of a single one counts little.
    """
    dtype, generator = tensors[0].dtype, torch.Generator().manual_seed(0)
    worst = [0.0] * len(want)
    for trial in range(9 if dtype == torch.float32 else 1):
        factors = [1 + trial % 9 / 9 * torch.rand(len(x), 1, generator=generator).to(x.device) for x in tensors]
        longer = [(x * f).to(dtype) for x, f in zip(tensors, factors, strict=True)]
        found = plain(longer, targets, chosen, dtype)
        found[1 : 1 + len(tensors)] = [g * f for g, f in zip(found[1:], factors, strict=False)]
        worst = [max(e, float((x - y).abs().max())) for e, x, y in zip(worst, found, want, strict=True)]
    return worst


def one_rounding(tensors, chosen) -> list[float]:
    """How far one rounding of one score, at most scale in size, moves a gradient of the queries and of the candidates."""
    weights, prefixes = chosen.get("weights_N"), chosen.get("prefixes", (tensors[0].shape[1],))
    share = 1 / max(1, len(tensors[0])) if weights is None else float(weights.max() / weights.sum())
    share *= sum(chosen.get("prefix_weights", [1.0])) * chosen["scale"]
    shortest = [float(x[:, : prefixes[0]].double().norm(dim=1).min()) for x in tensors]
    return [2.0**-24 * chosen["scale"] * share / length for length in shortest]


def assert_close(got, tensors, targets, chosen):
    """Loss and each gradient within 1e-5 of the largest. Twice the error of PyTorch in that dtype is allowed beside in half
    precision; for a loss less than 0.1 above the least possible one, which is what rounding left of a difference; and at
    a scale above 20: a score of 50 is a multiple of 4e-6 in fp32 and one of 200 of 1.5e-5, before anything is computed
    from it. So near the least loss gradients are nothing but rounding, and one rounding of one score is allowed."""
    want, scale_at = plain(tensors, targets, chosen), 1 + len(tensors)
    dtype = tensors[0].dtype
    least = float(want[0]) - least_loss(chosen) < 0.1
    lenient = dtype.itemsize == 2 or chosen["scale"] > 20 or least
    allowed = rounding(want, tensors, targets, chosen) if lenient else [0.0] * len(want)
    if least and dtype == torch.float32 and len(tensors[0]):
        for i, unit in enumerate(one_rounding(tensors, chosen), 1):
            allowed[i] = max(allowed[i], unit / 2)
    # A weight's gradient is a difference of losses over the sum of weights, so that is its unit.
    weights = chosen.get("weights_N")
    unit = float(want[0]) / float(weights.sum()) if weights is not None and len(weights) else 0.1
    for i, (x, y, z) in enumerate(zip(got, want, allowed, strict=True)):
        error = float((x - y).abs().max())
        # The scale's gradient is a difference of mean cosines, so its unit is 1, however small it comes out.
        # Embeddings of a loss near zero have gradients that are all rounding.
        floor = 1.0 if i == scale_at else max(unit, 0.1) if i == scale_at + 1 else 0.1 if i == 0 else 1e-3
        largest = max(float(y.abs().max()), floor)
        bar = 2 * z + 1e-5 * largest
        name = "loss" if i == 0 else f"gradient {i}"
        assert error <= bar, f"{name}: error {error:.2e}, allowed {bar:.2e}, largest {largest:.2e}"


@st.composite
def options(draw):
    """Random arguments of `problem`."""
    chosen = dict(draw(st.sampled_from(list(VARIANTS.values()))))
    chosen["scale"] = draw(st.sampled_from([1.0, 20.0, 50.0, 200.0]))
    for key, value in (("ids", 1), ("owners", True), ("margin", 0.02), ("weights", True)):
        if draw(st.booleans()):
            chosen[key] = value
    return chosen
