"""The proof of a base: before it is used, what it computes is compared with what it has to compute.

The first time that a configuration is used with a backend, random texts go through the smallest copy of its architecture, on the
very path that training and encoding take (`PackedDecoder`), in fp32 on the CPU. Three things have to hold:

- isolation: a text's states are the same alone and among others;
- direction: what comes behind a token moves its state, or does not, as asked, in every layer of attention;
- equality: the states are those of transformers' own eager attention, text by text.

The first path that passes is taken: packed, else a row a text. Where none passes, the base is refused.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from l2v.batch import Segment, pack
from l2v.errors import UserError, first_line
from l2v.files import replace_text
from l2v.model.direction import TOLERANCE, alone, difference, direction, last_changed, mixers
from l2v.model.embedded import cache_folder
from l2v.model.memory import is_out_of_memory
from l2v.model.packed import PackedDecoder
from l2v.model.path import ForwardPath, Layout, set_path
from l2v.model.settings import drop_nothing, quiet_transformers, set_attention, state_direction
from l2v.model.small import WINDOW, small_model

LENGTHS = (3 * WINDOW - 1, WINDOW, 1, 2 * WINDOW - 1, 3 * WINDOW - 1, WINDOW + 2)
"""Of the texts: within the copy's window, beyond it, and twice the same length."""
PATHS: dict[str, tuple[tuple[Layout, str], ...]] = {
    "l2v": (("packed", "l2v"), ("padded", "l2v"), ("padded", "sdpa"), ("padded", "eager"), ("rows", "eager")),
    "sdpa": (("packed", "sdpa"), ("padded", "sdpa"), ("padded", "eager"), ("rows", "eager")),
    "flash_attention_2": (("packed", "flash_attention_2"),),
}
"""The paths of a backend, fastest first."""


@dataclass(frozen=True)
class Proof:
    """What was measured. refused: why the base cannot be used, as a sentence; else None.

    path: how its batches run. fused: whether its layers run fused. apart: the largest difference of a text alone and among
    others. eager: the largest difference from eager transformers. alone: class names of layers that stay causal in themselves,
    beside attention that sees both ways. slower: why faster paths were not taken, as the rest of a sentence; else None. open: no
    small copy could be run, so the real model has to be looked at (`check_model`). random: how far two forwards in training mode
    are apart, where a layer draws random numbers that no key decides; it cannot be trained then. lasting: whether the next use
    may rely on it; not where an error decided that may have been of this moment, such as too little memory.
    """

    path: ForwardPath
    fused: bool = False
    apart: float = 0.0
    eager: float = 0.0
    alone: tuple[str, ...] = ()
    slower: str | None = None
    refused: str | None = None
    open: bool = False
    random: float | None = None
    lasting: bool = True

    def note(self) -> str | None:
        """One line on a slower path, or None."""
        if self.slower is None:
            return None
        rows = {"padded": "each text takes a row of its own", "rows": "only texts of one length run together"}
        how = rows.get(self.path.layout, "packed")
        return f"{how}, with {self.path.attention} attention, slower than packed: {self.slower}"


def prove(
    config: PretrainedConfig, *, backend: str, causal: bool, layers: str = "auto", trust_remote_code: bool = False
) -> Proof:
    """The proof of a configuration, from the user's cache folder where it has been made before.

    Bases with code of their own are proved each time, since their code is not part of the configuration.
    """
    file = None if trust_remote_code else _cache_file(config, backend, causal, layers)
    if file is not None and (kept := _read(file)) is not None:
        return kept
    with quiet_transformers():
        proof = measure(config, backend=backend, causal=causal, layers=layers, trust_remote_code=trust_remote_code)
    if file is not None and proof.lasting:
        with suppress(OSError):  # a cache folder that cannot be written costs time, nothing else
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(file, json.dumps(asdict(proof), indent=1) + "\n")
    return proof


def measure(
    config: PretrainedConfig, *, backend: str, causal: bool, layers: str = "auto", trust_remote_code: bool = False
) -> Proof:
    """As `prove`, without the cache."""
    candidates = [ForwardPath(layout, attention) for layout, attention in PATHS[backend]]
    if backend == "flash_attention_2":  # it has no fp32 and no CPU; `check_model` looks at the real model
        return Proof(candidates[0], open=True)
    config = copy.deepcopy(config)
    state_direction(config, causal=causal)
    try:
        model = small_model(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        why = f"no small copy of this architecture can be made to prove more ({first_line(error)})"
        return Proof(candidates[-1], slower=why, open=True, lasting=not _of_this_moment(error))
    set_attention(model, causal=causal)
    return prove_model(model, candidates, causal=causal, layers=layers)


@torch.no_grad()
def prove_model(
    model: PreTrainedModel, candidates: Sequence[ForwardPath], *, causal: bool, layers: str = "auto"
) -> Proof:
    """The proof of a small model: the first of the paths that passes, or a refusal."""
    texts = random_texts(model)
    first = candidates[0]
    try:
        expected = _reference(model, texts)
        wrong, alone = direction(model, texts, causal)
    except Exception as error:
        how = "causal" if causal else "bidirectional"
        why = f"transformers itself cannot run it with {how} attention: {first_line(error)}"
        return Proof(first, refused=why, lasting=False)
    drop_nothing(model)  # after the reference, which it must not change
    width, stated = expected[0].shape[-1], model.config.get_text_config().hidden_size
    if width != stated:
        wrong = f"its states are {width} wide where hidden_size says {stated}"
    if wrong:
        return Proof(first, refused=wrong)
    failures: list[str] = []
    errors: list[Exception] = []
    for path in candidates:
        try:
            found = _try(model, path, texts, expected, causal=causal, layers=layers)
        except Exception as error:
            failures.append(f"{path.name}: {first_line(error)}")
            errors.append(error)
            continue
        if isinstance(found, Proof):
            lasting = not any(map(_of_this_moment, errors))
            return replace(found, alone=alone, slower=failures[0] if failures else None, lasting=lasting)
        failures.append(f"{path.name}: {found}")
    return Proof(first, refused="; ".join(failures), lasting=not errors)


def _of_this_moment(error: Exception) -> bool:
    """Whether an error may be gone at the next use: memory, files, an installation that is repaired."""
    return isinstance(error, OSError | ImportError) or is_out_of_memory(error)


def _reference(model: PreTrainedModel, texts: list[np.ndarray]) -> list[torch.Tensor]:
    """States of each text as transformers computes them: eager, or SDPA where a model's eager code fails without a mask."""
    try:
        return [alone(model, ids) for ids in texts]
    except Exception:
        model.set_attn_implementation("sdpa")
        if model.config.get_text_config()._attn_implementation != "sdpa":
            raise
        return [alone(model, ids) for ids in texts]


def random_texts(model: PreTrainedModel) -> list[np.ndarray]:
    """Texts of LENGTHS without special tokens, int64 each."""
    config = model.config.get_text_config()
    generator = np.random.default_rng(0)
    special = {v for k, v in vars(config).items() if k.endswith("token_id") and isinstance(v, int)}
    ids = np.array([i for i in range(5, config.vocab_size) if i not in special])
    return [generator.choice(ids, length) for length in LENGTHS]


def _try(
    model: PreTrainedModel, path: ForwardPath, texts: list[np.ndarray], expected: list[torch.Tensor], *, causal: bool,
    layers: Any,
) -> Proof | str:  # fmt: skip
    """The proof on one path, or what was seen instead, as the rest of a sentence."""
    with _on(model, path):
        packed = PackedDecoder(model, causal=causal, layers=layers).eval()
        run = functools.partial(_states, packed)
        together = run(texts)
        single = [run([text])[0] for text in texts]
        apart = max(difference(a, b) for a, b in zip(together, single, strict=True))
        others = run([text if at == 1 else text[::-1].copy() for at, text in enumerate(texts)])
        apart = max(apart, difference(others[1], together[1]))
        if not apart <= TOLERANCE:
            return f"a text's states change by {apart:.2g} with the texts beside it, {mixers(model)}"
        eager = max(difference(a, b) for a, b in zip(together, expected, strict=True))
        if not eager <= TOLERANCE:
            return f"states are {eager:.2g} off transformers' own eager attention"
        moved = [difference(run([*texts[:at], last_changed(texts[at])])[at], together[at]) for at in (1,)]
        assert moved[0] > TOLERANCE  # the last token moves its own state
        return Proof(path, packed.fused is not None, apart, eager, random=_draws(packed, texts))


@torch.no_grad()
def check_model(run: Any, model: PackedDecoder, *, name: str) -> float:
    """Isolation and direction of the real model in its own precision. A collective call where an engine gathers weights.

    run: the model, or the engine around it. Three short texts run twice, with other texts beside the second one and with another
    last token. Returns the tolerance: 1e-5 in fp32, 1/64 in bf16 and fp16 (a share of the largest state), which is for sums in
    another order; a state that is to move has to move by any amount.

    Raises:
        UserError: it fails.
    """
    where, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        texts = random_texts(getattr(model.decoder, "get_base_model", lambda: model.decoder)())[:4]

        def states(each: list[np.ndarray]) -> torch.Tensor:
            batch = pack([Segment(ids, example=at) for at, ids in enumerate(each)]).to(where)
            return run(batch, "hidden").split([len(ids) for ids in each])[1].float()

        here = states(texts)
        others = states([ids if at == 1 else ids[::-1].copy() for at, ids in enumerate(texts)])
        moved = (
            (states([last_changed(ids) if at == 1 else ids for at, ids in enumerate(texts)])[0] - here[0]).abs().max()
        )
    finally:
        model.train(training)
    tolerance = TOLERANCE if next(model.parameters()).dtype == torch.float32 else 2.0**-6
    if not (apart := difference(others, here)) <= tolerance:
        raise UserError(
            f"the base '{name}': a text's states change by {apart:.2g} with the texts beside it (rounding: at most "
            f"{tolerance:.2g}), so its vectors cannot be trusted; use base.backend: sdpa"
        )
    largest = here.abs().max().clamp(min=1.0)
    if (moved > tolerance * largest) if model.causal else not moved > 0:
        seen = "moves the first state, and causal" if model.causal else "never moves the first state, and bidirectional"
        raise UserError(
            f"the base '{name}': the last token {seen} attention was asked for; use another base.attention or backend"
        )
    return tolerance


@contextmanager
def _on(model: PreTrainedModel, path: ForwardPath) -> Iterator[None]:
    """The model with the attention and the layout of a path, and after it with its own attention again."""
    before = model.config.get_text_config()._attn_implementation
    if path.attention == "l2v":
        from l2v_kernels.integrations.transformers import register

        register()
    try:
        model.set_attn_implementation(path.attention)
        if model.config.get_text_config()._attn_implementation != path.attention:
            raise ValueError("transformers has no choice of attention for it")
        set_path(model, path)
        yield
    finally:
        model.set_attn_implementation(before)
        set_path(model, ForwardPath("rows", before))


def _states(packed: PackedDecoder, texts: list[np.ndarray]) -> list[torch.Tensor]:
    """Hidden states of the texts in one batch, [n, E] each."""
    where = next(packed.parameters()).device
    batch = pack([Segment(ids, example=at) for at, ids in enumerate(texts)]).to(where)
    return list(packed(batch, "hidden").split([len(ids) for ids in texts]))


def _draws(packed: PackedDecoder, texts: list[np.ndarray]) -> float | None:
    """How far two forwards in training mode are apart, if at all; the only dropout is to be keyed."""
    packed.train()
    try:
        with torch.random.fork_rng(devices=[]):
            first, second = (_states(packed, texts[:2]) for _ in range(2))
    finally:
        packed.eval()
    off = max(difference(a, b) for a, b in zip(first, second, strict=True))
    return off if off > TOLERANCE else None


def _read(file: Path) -> Proof | None:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        path = ForwardPath(**facts.pop("path"))
        return Proof(path, **facts | {"alone": tuple(facts["alone"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _cache_file(config: PretrainedConfig, backend: str, causal: bool, layers: str) -> Path:
    """Named by a hash of everything that decides a proof."""
    shape = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version", "dtype")}
    versions = [torch.__version__, transformers.__version__, _sources()]
    facts = json.dumps([shape, backend, causal, layers, versions], sort_keys=True, default=str)
    return cache_folder() / "proofs" / f"{hashlib.sha256(facts.encode()).hexdigest()[:32]}.json"


@functools.cache
def _sources() -> str:
    """A hash of the code that a proof runs through; finer than a version, which stays while the code is worked on."""
    import l2v_kernels

    here, kernels = Path(__file__).parent, Path(l2v_kernels.__file__).parent
    digest = hashlib.sha256()
    for file in sorted([*here.rglob("*.py"), *kernels.rglob("*.py"), here.parent / "batch.py"]):
        digest.update(file.read_bytes())
    return digest.hexdigest()
