"""Encoder: texts in, vectors out. Load it from a base, adapters, a training run or an export."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
from tqdm import tqdm

from l2v.batch import PackedBatch, Segment, pack
from l2v.data.tokens import TextTokenizer, as_ids, check_vocabulary, load_tokenizer
from l2v.errors import Notice, UserError
from l2v.model.embedded import resolve
from l2v.model.engines import Report
from l2v.model.export import export
from l2v.model.licence import base_licence
from l2v.model.load import device, dtype_of, fingerprint, inner_model, load_config, load_model, proof_of
from l2v.model.lora import describe_adapter, merge_adapters
from l2v.model.packed import PackedDecoder
from l2v.model.portable import from_portable, to_portable
from l2v.model.proof import check_model
from l2v.model.vocabulary import grow_embedding, rows_of, rows_with
from l2v.recipe import Base, Template
from l2v.recipe.instructions import Instructions
from l2v.runs.source import Found, find

Empty = Literal["error", "zeros", "skip"]
MAX_BATCH_TOKENS = 16384
CORE_TOKENS = 512
"""Tokens of a forward for each core of a CPU, at least two cores' worth: the activations of more leave the caches."""
FIRST_FORWARDS, FORWARDS, CHARACTERS = 2, 32, 4


class Encoder:
    """A decoder made into a text encoder. Build it with `from_pretrained`.

    Attributes: `instructions`, those it was trained with; `truncated`, the number of texts it has cut so far.
    """

    def __init__(
        self,
        model: PackedDecoder,
        tokenizer: TextTokenizer,
        *,
        name: str,
        lineage: dict[str, Any],
        instructions: Instructions | None = None,
        normalize: bool = True,
        licence: str | None = None,
        matryoshka: Sequence[int] = (),
    ) -> None:
        """normalize: whether `encode` scales vectors to length 1 where its caller does not say. licence: the base's, by its
        identifier on the Hub; None if it is not known. `save` writes what it requires. matryoshka: the prefix lengths that it
        was trained on.
        """
        self.matryoshka = list(matryoshka)
        self.model, self.tokenizer, self.name, self.lineage = model.eval(), tokenizer, name, lineage
        self.instructions, self.truncated, self.normalize = instructions or Instructions(), 0, normalize
        self.licence = licence

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: the weights too, so that each worker of a pool has its own copy of them."""
        return self.__dict__ | {"model": to_portable(self.model)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.model = _place(from_portable(state["model"]), device())

    @classmethod
    def from_pretrained(
        cls,
        base_or_run: str | Path,
        adapters: Sequence[str] = (),
        *,
        pooling: str | None = None,
        pool_prompt: bool | None = None,
        attention: str | None = None,
        template: Template | None = None,
        length: int | None = None,
        precision: str | None = None,
        backend: str | None = None,
        base_only: bool = False,
        trust_remote_code: bool = False,
    ) -> Encoder:
        """Load an encoder. An argument that is not given comes from the run, or has the default below.

        Args:
            base_or_run: a folder or hub name of a decoder, the name of an embedded base, an export of `save`, a stage of a
                run (`runs/NAME/supervised`) or a run (its last trained stage; a `Notice` says which, if others are not
                trained yet). A published sentence-transformers model keeps the pooling, prompts, normalisation, direction
                and length that its files state.
            adapters: folders or hub names of PEFT LoRA adapters, merged in order, in float32, rounded once.
            pooling: `mean` (default), `weighted_mean`, `last` or `first`.
            pool_prompt: pool all tokens, also special tokens, template and instruction. Default: no.
            attention: `bidirectional` (default) or `causal`.
            template: what is put before and after each text; none by default.
            length: tokens of a text, as `max_length`. Default 512.
            precision: of the weights and of the arithmetic, `bf16` or `fp32`; `auto` is bf16 on a GPU and fp32 on every CPU.
                Default: what the recipe or the export states, else `auto`.
            backend: of attention: `l2v` (default), `sdpa` or `flash_attention_2`.
            base_only: the untrained base of a run or an adapter, with the run's template and length.
            trust_remote_code: run code that comes with the base. Only this argument allows it, never a run, an export or a
                recipe.

        Raises:
            UserError: something does not exist or does not fit; one sentence.
        """
        found = _chosen(
            base_or_run, base_only, pooling=pooling, pool_prompt=pool_prompt, attention=attention, template=template,
            precision=precision, backend=backend,
        )  # fmt: skip
        base, merged = found.base, [*found.adapters, *adapters]
        dtype = dtype_of(base.precision, encoding=True)
        loaded = load_model(base, head=False, dtype=dtype, trust_remote_code=trust_remote_code)
        if note := proof_of(inner_model(loaded)).note():
            warnings.warn(f"the base '{base.model}': {note}", Notice, stacklevel=2)
        inner = merge_adapters(inner_model(loaded), merged)
        if found.rows > rows_of(inner):
            grow_embedding(inner, found.rows)
        model = PackedDecoder(inner, causal=base.attention == "causal", backend=base.backend, pooling=base.pooling)
        model = _place(model, device())
        if proof_of(inner).open:
            check_model(model, model, name=base.model)
        tokenizer = load_tokenizer(
            base.tokenizer or resolve(base.model), revision=base.revision, trust_remote_code=trust_remote_code
        )
        check_vocabulary(tokenizer, rows_of(inner), base)
        lineage = {"base": {"model": base.model}, "merged": [describe_adapter(adapter) for adapter in merged]}
        encoder = cls(
            model, TextTokenizer(tokenizer, base.template, 512, pooled=found.pooled), name=str(base_or_run), lineage=lineage,
            instructions=found.instructions, normalize=found.normalize, matryoshka=found.matryoshka,
            licence=None if base.init == "random" else base_licence(base.model, inner.config.model_type),
        )  # fmt: skip
        encoder.max_length = (found.length or 512) if length is None else length
        return encoder

    @staticmethod
    def identity(base_or_run: str | Path, adapters: Sequence[str] = (), **options: Any) -> dict[str, Any]:
        """What decides the vectors of `from_pretrained(base_or_run, adapters, **options)`, without loading it.

        Use it as a key for stored vectors or scores: base and adapters in order (with their hashes), pooling, attention,
        template, length, and the precision on this machine.

        Raises:
            UserError: as `from_pretrained`.
        """
        length, trust = options.pop("length", None), options.pop("trust_remote_code", False)
        found = _chosen(base_or_run, options.pop("base_only", False), **options)
        base, merged = found.base, [*found.adapters, *adapters]
        load_config(base, trust_remote_code=trust)  # so that an unknown name fails here and not when it is loaded
        return {
            "base": base.model,
            "sha256": fingerprint(base),
            "merged": [describe_adapter(adapter)["sha256"] for adapter in merged],
            "pooling": base.pooling,
            "attention": base.attention,
            "template": asdict(base.template),
            **({} if found.pooled == "text" else {"pooled": found.pooled}),
            "length": length or found.length or 512,
            "precision": str(dtype_of(base.precision, encoding=True)).removeprefix("torch."),
        }

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self.model.decoder.config.get_text_config().hidden_size

    @property
    def max_length(self) -> int:
        """Tokens of a text, with template and instruction; longer texts are cut. It can be set.

        Raises:
            UserError: it is set to something else than a whole number from 1.
        """
        return self.tokenizer.length

    @max_length.setter
    def max_length(self, tokens: int) -> None:
        self.tokenizer.length = _count(tokens, "the length of a text in tokens")

    @torch.inference_mode()
    def encode(
        self,
        texts: str | Sequence[str],
        instruction: str | None = None,
        normalize: bool | None = None,
        batch_tokens: int | None = None,
        show_progress: bool = False,
        dimensions: int | None = None,
        batch_size: int | None = None,
        empty: Empty = "error",
    ) -> np.ndarray:
        """Vectors of texts. A vector depends only on its own text, never on the others.

        Texts are tokenized and sorted by length in windows, the first one small: however many there are, vectors come at once.

        Args:
            texts: one text or several. A text longer than `max_length` is cut; a `Notice` warning says how many were.
            instruction: put before each text; the model reads it, but it is not pooled.
            normalize: scale each vector to length 1. Default: yes, but for a published sentence-transformers model without
                its Normalize module.
            batch_tokens: tokens in one forward. Default: 16,384 on a GPU, 512 a core on a CPU (at least 1,024).
            show_progress: show a progress bar.
            dimensions: keep only the first dimensions, cut before normalising; for the `matryoshka` lengths that a stage
                was trained on (Kusupati et al. 2022, arXiv 2205.13147).
            batch_size: at most so many texts in one forward, besides `batch_tokens`.
            empty: what becomes of a text without a character (None, or white space alone): `error` (default) refuses it,
                `zeros` gives it a vector of zeros, `skip` leaves its row out.

        Returns:
            float32 [texts, dimension] in the order given, or [dimension] for a single text.

        Raises:
            UserError: a text is empty or no text, or an argument is out of range.
        """
        width = self._width(dimensions)
        most = None if batch_size is None else _count(batch_size, "batch_size")
        where = next(self.model.parameters()).device
        budget = _batch_tokens(where) if batch_tokens is None else _count(batch_tokens, "batch_tokens")
        if instruction is not None:
            _check_text(instruction, "the instruction")
        single = isinstance(texts, str)
        texts = as_texts(texts)
        used = nonempty(texts, empty)
        rows = list(range(len(used))) if empty == "skip" else used
        out = np.zeros((len(used) if empty == "skip" else len(texts), width), dtype=np.float32)
        cut = 0
        with tqdm(total=len(used), desc="encode", unit="text", disable=not show_progress, leave=False) as bar:
            for window in windows([len(texts[at]) for at in used], budget):
                ids, starts, over = self.tokenizer.embedded([texts[used[i]] for i in window], instruction)
                cut += over
                order = sorted(range(len(window)), key=lambda i: -len(ids[i]))
                for chosen in _batches(order, [len(i) for i in ids], budget, most):
                    batch = pack([Segment(as_ids(ids[i]), starts[i], text_key=0) for i in chosen])
                    vectors_SE = self.embed(batch.to(where))[:, :width]
                    if self.normalize if normalize is None else normalize:
                        vectors_SE = torch.nn.functional.normalize(vectors_SE, dim=-1)
                    out[[rows[window[i]] for i in chosen]] = vectors_SE.cpu().numpy()
                    bar.update(len(chosen))
        self._note_cut(cut, len(used))
        return out[0] if single and len(out) else out

    def encode_query(self, texts: str | Sequence[str], instruction: str | None = None, **options: Any) -> np.ndarray:
        """`encode` with the query instruction of the training; plain texts if it had none.

        instruction: instead of the trained one; "" for none. options: as for `encode`.

        Raises:
            UserError: as `encode`; or it was trained with several query instructions, and none is given.
        """
        return self.encode(texts, self.instructions.one("query") if instruction is None else instruction, **options)

    def encode_document(self, texts: str | Sequence[str], instruction: str | None = None, **options: Any) -> np.ndarray:
        """`encode` with the document instruction of the training; arguments and errors as for `encode_query`."""
        return self.encode(texts, self.instructions.one("document") if instruction is None else instruction, **options)

    @staticmethod
    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine similarities of vectors a [N, E] and b [M, E], normalised or not: float32 [N, M]. A single vector is one row.

        A vector of zeros has similarity 0 with every vector.

        Raises:
            UserError: they are not vectors of one width.
        """
        a_NE, b_ME = (np.atleast_2d(np.asarray(x, dtype=np.float32)) for x in (a, b))
        if a_NE.ndim != 2 or b_ME.ndim != 2 or a_NE.shape[1] != b_ME.shape[1]:
            raise UserError(f"similarity needs vectors of one width; found shapes {np.shape(a)} and {np.shape(b)}")
        least = np.finfo(np.float32).tiny
        a_NE, b_ME = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), least) for x in (a_NE, b_ME))
        return a_NE @ b_ME.T

    def embed(self, batch: PackedBatch) -> torch.Tensor:
        """Pooled vectors of a packed batch, float32 [S, E], not normalised."""
        return self.model(batch, "vectors")

    def save(self, folder: str | Path, engines: Sequence[str] = ()) -> list[Report]:
        """Write a plain transformers checkpoint (`is_causal: false`, no remote code) with the sentence-transformers files.

        `SentenceTransformer(folder)` gives the vectors of `encode`, `encode_query` and `encode_document`;
        `AutoModel.from_pretrained(folder)` gives the hidden states. Both need transformers 5.2 or newer. The base's licence
        goes with it, and the notice and terms that it requires.

        engines: those that have to give the same vectors, of transformers, sentence-transformers, vllm and tei. Returns what
        every engine gives from the folder (name, vectors, refused), as docs/serving.md explains.

        Raises:
            UserError: the folder cannot be written, or one of the engines cannot give these vectors; nothing is written then.
        """
        return export(
            self.model, self.tokenizer, Path(folder), self.lineage, self.instructions, normalize=self.normalize,
            licence=self.licence, matryoshka=self.matryoshka, engines=engines,
        )  # fmt: skip

    def _width(self, dimensions: int | None) -> int:
        width = self.dimension if dimensions is None else dimensions
        if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= self.dimension:
            raise UserError(
                f"dimensions is {dimensions}; give a whole number from 1 to {self.dimension}, the width of the vectors"
            )
        return width

    def _note_cut(self, cut: int, count: int) -> None:
        if cut:
            self.truncated += cut
            warnings.warn(
                f"{cut:,} of {count:,} texts are longer than {self.max_length} tokens and were cut; max_length (l2v export "
                "--length) sets the limit", Notice, stacklevel=4,
            )  # fmt: skip


def as_texts(texts: str | Sequence[str]) -> list[str]:
    """A list of the texts in any container; one text becomes a list of one.

    Raises:
        UserError: it is no container of texts, or one without an order, or a table.
    """
    if isinstance(texts, str):
        return [texts]
    found = type(texts).__name__
    if isinstance(texts, bytes | bytearray):
        raise UserError(f"encode takes a text or several texts; found {found}: decode it first (.decode())")
    if isinstance(texts, Set):
        raise UserError(f"encode takes texts in an order, which a {found} has not; give a list")
    if isinstance(texts, Mapping) or hasattr(texts, "columns"):  # whose keys or column names would be encoded
        raise UserError(f"encode takes a text or several texts; found {found}: give one of its columns or its values")
    try:
        return list(texts)
    except TypeError:
        raise UserError(f"encode takes a text or several texts; found {found}") from None


def nonempty(texts: Sequence[str | None], empty: Empty) -> list[int]:
    """Positions of the texts with at least one character; None and white space are empty.

    Raises:
        UserError: one of them is no text, or holds half a surrogate pair; or one is empty and `empty` is `error`.
    """
    if empty not in ("error", "zeros", "skip"):
        raise UserError(f"empty is '{empty}'; use error, zeros or skip")
    out = []
    for at, text in enumerate(texts):
        if isinstance(text, str) and text.strip():
            _check_text(text, f"text {at}")
            out.append(at)
        elif text is not None and not isinstance(text, str):
            _check_text(text, f"text {at}")
        elif empty == "error":
            what = "empty" if isinstance(text, str) else "NoneType"
            raise UserError(f'text {at} is {what}; an empty text has no embedding (empty="zeros" or "skip" accepts it)')
    return out


def _check_text(text: Any, what: str) -> None:
    if not isinstance(text, str):
        raise UserError(f"{what} is no text; found {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} holds half of a surrogate pair ({text[error.start]!a}, character {error.start + 1}), which is no "
            "text; remove it, or put U+FFFD in its place"
        ) from None


def _count(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{what} is {value}; give a whole number from 1")
    return value


def _batch_tokens(where: torch.device) -> int:
    if where.type != "cpu":
        return MAX_BATCH_TOKENS
    return min(MAX_BATCH_TOKENS, CORE_TOKENS * max(2, torch.get_num_threads()))


def windows(characters: Sequence[int], budget: int) -> Iterator[range]:
    """Texts of these numbers of characters, in order, by what is tokenized together: at first of two forwards, then of 32.

    budget: tokens of a forward. A token has four characters or less, so a window rarely fills more forwards than that.
    """
    begin, room = 0, FIRST_FORWARDS * budget * CHARACTERS
    for at, count in enumerate(characters):
        if at > begin and count > room:
            yield range(begin, at)
            begin, room = at, FORWARDS * budget * CHARACTERS
        room -= count
    if begin < len(characters):
        yield range(begin, len(characters))


def _batches(order: list[int], lengths: list[int], budget: int, most: int | None) -> list[list[int]]:
    """Texts of one forward each: `budget` tokens (a longer text alone), at most `most` texts."""
    out: list[list[int]] = []
    room = 0
    for i in order:
        if not out or lengths[i] > room or len(out[-1]) == most:
            out.append([])
            room = budget
        out[-1].append(i)
        room -= lengths[i]
    return out


def _place(model: PackedDecoder, where: torch.device) -> PackedDecoder:
    """The model on its device; on a GPU with the weights of q, k and v and of gate and up in one buffer: 4 matmuls a layer
    instead of 7. On a CPU weights stay mapped from their file, which processes share; stacked ones would be copies.
    """
    model = model.to(where)
    if where.type == "cuda" and model.fused is not None:
        model.fused.stack_weights()
    return model


def _chosen(source: str | Path, base_only: bool, **options: Any) -> Found:
    """What a name refers to, with the caller's options replacing the run's."""
    found = find(str(source))
    if found.note:
        warnings.warn(found.note, Notice, stacklevel=3)
    hints = get_type_hints(Base)
    for key, value in options.items():
        if value is None:
            continue
        choices = get_args(hints[key]) if get_origin(hints[key]) is Literal else ()
        if choices and value not in choices:
            raise UserError(f"{key} is {value!r}; choose one of {', '.join(choices)}")
        setattr(found.base, key, value)
    if options.get("pool_prompt") is not None:
        found.pooled = "all" if found.base.pool_prompt else "text"
    if base_only:
        found.rows = rows_with(found.adapters, 0)  # new tokens have the vector that their training began with
        found.adapters = []
    return found
