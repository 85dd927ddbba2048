"""Encoder: texts in, vectors out. Load it from a base, adapters, a training run or an export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from l2v.batch import PackedBatch, Segment, pack
from l2v.data.tokens import TextTokenizer, as_ids, load_tokenizer
from l2v.errors import UserError
from l2v.model.embedded import SMOLLM2, resolve
from l2v.model.export import ENCODER_FILE, export
from l2v.model.load import device, dtype_of, fingerprint, inner_model, load_config, load_model
from l2v.model.lora import LINEAGE, adapter_folder, describe_adapter, merge_adapters
from l2v.model.packed import PackedDecoder
from l2v.recipe import Base, Template
from l2v.runs.folder import ADAPTER, is_stage, is_trained, stage_folders, stage_recipe, trained_stages


class Encoder:
    """A decoder made into a text encoder. Build it with `from_pretrained`."""

    def __init__(self, model: PackedDecoder, tokenizer: TextTokenizer, *, name: str, lineage: dict[str, Any]) -> None:
        self.model, self.tokenizer, self.name, self.lineage = model.eval(), tokenizer, name, lineage

    @classmethod
    def from_pretrained(
        cls,
        base_or_run: str | Path,
        adapters: Sequence[str] = (),
        *,
        pooling: str | None = None,
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
                run (`runs/NAME/supervised`) or a run (its last trained stage).
            adapters: folders or hub names of PEFT LoRA adapters, merged in order, in float32, rounded once.
            pooling: `mean` (default), `weighted_mean`, `last` or `first`.
            attention: `bidirectional` (default) or `causal`.
            template: what is put before and after each text; none by default.
            length: tokens of a text; longer ones are cut. Default 512.
            precision: of the weights and of the arithmetic, `bf16` or `fp32`; `auto` is bf16 on a GPU and fp32 on every CPU.
                Default: what the recipe or the export states, else `auto`.
            backend: of attention: `l2v` (default), `sdpa` or `flash_attention_2`.
            base_only: the untrained base of a run or an adapter, with the run's template and length.
            trust_remote_code: run code that comes with the base. Only this argument allows it, never a run, an export or a
                recipe.

        Raises:
            UserError: something does not exist or does not fit; one sentence.
        """
        base, merged, limit = _chosen(
            base_or_run, base_only, pooling=pooling, attention=attention, template=template, precision=precision,
            backend=backend,
        )  # fmt: skip
        merged = [*merged, *adapters]
        inner = inner_model(
            load_model(
                base,
                head=False,
                dtype=dtype_of(base.precision, encoding=True),
                trust_remote_code=trust_remote_code,
            )
        )
        inner = merge_adapters(inner, merged)
        model = PackedDecoder(inner, causal=base.attention == "causal", backend=base.backend, pooling=base.pooling).to(
            device()
        )
        tokenizer = load_tokenizer(
            base.tokenizer or resolve(base.model), revision=base.revision, trust_remote_code=trust_remote_code
        )
        texts = TextTokenizer(tokenizer, base.template, length or limit or 512)
        lineage = {"base": {"model": base.model}, "merged": [describe_adapter(adapter) for adapter in merged]}
        return cls(model, texts, name=str(base_or_run), lineage=lineage)

    @staticmethod
    def identity(base_or_run: str | Path, adapters: Sequence[str] = (), **options: Any) -> dict[str, Any]:
        """What decides the vectors of `from_pretrained(base_or_run, adapters, **options)`, without loading it.

        Use it as a key for stored vectors or scores: base and adapters in order (with their hashes), pooling, attention,
        template, length, and the precision on this machine.

        Raises:
            UserError: as `from_pretrained`.
        """
        length, trust = options.pop("length", None), options.pop("trust_remote_code", False)
        base, merged, limit = _chosen(base_or_run, options.pop("base_only", False), **options)
        load_config(base, trust_remote_code=trust)  # so that an unknown name fails here and not when it is loaded
        return {
            "base": base.model,
            "sha256": fingerprint(base),
            "merged": [describe_adapter(adapter)["sha256"] for adapter in [*merged, *adapters]],
            "pooling": base.pooling,
            "attention": base.attention,
            "template": asdict(base.template),
            "length": length or limit or 512,
            "precision": str(dtype_of(base.precision, encoding=True)).removeprefix("torch."),
        }

    @property
    def dimension(self) -> int:
        """Width of the vectors."""
        return self.model.decoder.config.get_text_config().hidden_size

    @torch.inference_mode()
    def encode(
        self,
        texts: str | Sequence[str],
        instruction: str | None = None,
        normalize: bool = True,
        batch_tokens: int = 16384,
        show_progress: bool = False,
        dimensions: int | None = None,
    ) -> np.ndarray:
        """Vectors of texts. A vector depends only on its own text, never on the others.

        Args:
            texts: one text or several. A text longer than the encoder's length is cut.
            instruction: put before each text; the model reads it, but it is not pooled.
            normalize: scale each vector to length 1.
            batch_tokens: tokens in one forward.
            show_progress: show a progress bar.
            dimensions: keep only the first dimensions, cut before normalising; for the `matryoshka` lengths that a stage
                was trained on (Kusupati et al. 2022, arXiv 2205.13147).

        Returns:
            float32 [texts, dimension] in the order given, or [dimension] for a single text.

        Raises:
            UserError: a text is empty, or `dimensions` is no whole number from 1 to `dimension`.
        """
        width = self.dimension if dimensions is None else dimensions
        if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= self.dimension:
            raise UserError(
                f"dimensions is {dimensions}; give a whole number from 1 to {self.dimension}, the width of the vectors"
            )
        single = isinstance(texts, str)
        texts = [texts] if isinstance(texts, str) else list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"text {i} is empty; an empty text has no embedding")
        out = np.zeros((len(texts), width), dtype=np.float32)
        if not texts:
            return out
        ids, starts, _ = self.tokenizer.embedded(texts, instruction)
        order = sorted(range(len(texts)), key=lambda i: -len(ids[i]))
        where = next(self.model.parameters()).device
        with tqdm(total=len(texts), desc="encode", unit="text", disable=not show_progress, leave=False) as bar:
            for chosen in _batches(order, [len(i) for i in ids], batch_tokens):
                batch = pack([Segment(as_ids(ids[i]), starts[i]) for i in chosen])
                vectors_SE = self.embed(batch.to(where))[:, :width]
                if normalize:
                    vectors_SE = torch.nn.functional.normalize(vectors_SE, dim=-1)
                out[chosen] = vectors_SE.cpu().numpy()
                bar.update(len(chosen))
        return out[0] if single else out

    def embed(self, batch: PackedBatch) -> torch.Tensor:
        """Pooled vectors of a packed batch, float32 [S, E], not normalised."""
        return self.model(batch, "vectors")

    def save(self, folder: str | Path) -> None:
        """Write a plain transformers checkpoint (`is_causal: false`, no remote code) with the sentence-transformers files.

        `SentenceTransformer(folder)` gives the vectors of `encode`; `AutoModel.from_pretrained(folder)` gives the hidden
        states.
        """
        export(self.model, self.tokenizer, Path(folder), self.lineage)


def _batches(order: list[int], lengths: list[int], budget: int) -> list[list[int]]:
    out: list[list[int]] = [[]]
    room = budget
    for i in order:
        if out[-1] and lengths[i] > room:
            out.append([])
            room = budget
        out[-1].append(i)
        room -= lengths[i]
    return out


def _chosen(source: str | Path, base_only: bool, **options: Any) -> tuple[Base, list[str], int | None]:
    """What a name refers to, with the caller's options replacing the run's: base, adapters, text length."""
    base, merged, limit = _describe(str(source))
    for key, value in options.items():
        setattr(base, key, value or getattr(base, key))
    return base, [] if base_only else merged, limit


def _describe(source: str) -> tuple[Base, list[str], int | None]:
    """What a name refers to: its base, the adapters to merge into it, and its text length."""
    folder = Path(source)
    if (folder / ENCODER_FILE).is_file():
        facts = json.loads((folder / ENCODER_FILE).read_text(encoding="utf-8"))
        base = Base(
            model=source, template=Template(**facts["template"]), pooling=facts["pooling"], precision=facts["precision"]
        )
        base.attention = facts["attention"]
        return base, [], facts["length"]
    if is_stage(folder):
        return _stage(folder)
    if stage_folders(folder):
        return _stage(folder / list(trained_stages(folder))[-1])
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{source}: neither a model, an adapter nor a run of l2v")
    return Base(model=source, **_known(source)), [], None


def _known(model: str) -> dict[str, Any]:
    if model == SMOLLM2:
        return {"template": Template(prefix="<|im_start|>user\n", suffix="<|im_end|>")}
    return {}


def _stage(folder: Path) -> tuple[Base, list[str], int | None]:
    adapter = folder / ADAPTER
    if not is_trained(folder):
        raise UserError(f"{folder}: the stage is not fully trained yet; run 'l2v train' again to continue it")
    recipe = stage_recipe(folder)
    return recipe.base, [*_lineage(adapter), str(adapter)], recipe.stages[folder.name].length


def _adapter(folder: Path) -> tuple[Base, list[str], int | None]:
    if is_stage(folder.parent):
        return _stage(folder.parent)
    name = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise UserError(f"{folder}: its adapter_config.json names no base; give the base first and adapters=[...]")
    return Base(model=name, **_known(name)), [*_lineage(folder), str(folder)], None


def _lineage(adapter: Path) -> list[str]:
    """The adapters that this one was trained on, looked up next to it first, because the run may have been moved."""
    file = adapter / LINEAGE
    if not file.is_file():
        return []
    out = []
    for entry in json.loads(file.read_text(encoding="utf-8"))["merged"]:
        same_run = adapter.parent.parent / entry.get("stage", "") / ADAPTER
        path = str(same_run) if "stage" in entry and same_run.is_dir() else entry["adapter"]
        if describe_adapter(adapter_folder(path))["sha256"] != entry["sha256"]:
            raise UserError(
                f"{path}: not the adapter that {adapter} was trained on (its hash differs); restore or retrain it"
            )
        out.append(path)
    return out
