"""The merged export: a plain transformers checkpoint, bidirectional by its config, with sentence-transformers files."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from l2v.data.tokens import TextTokenizer
from l2v.errors import UserError
from l2v.files import follow_umask
from l2v.model.embedded import resolve
from l2v.model.engines import Report, check_engines, reports
from l2v.model.export_proof import keys_to_state, save_config, save_weights
from l2v.model.export_tokenizer import Framed, write_tokenizer
from l2v.model.licence import write_papers
from l2v.model.packed import PackedDecoder
from l2v.recipe import Template
from l2v.recipe.instructions import SIDES, Instructions
from l2v.recipe.tasks import TASKS

ENCODER_FILE = "l2v_encoder.json"
POOLING_MODES = {"mean": "mean", "weighted_mean": "weightedmean", "last": "lasttoken", "first": "cls"}
POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
"""The key of each of sentence-transformers' modes in the older spelling of its file."""


def check_free(folder: Path) -> None:
    """Raises: UserError: the folder holds something that is no export of l2v."""
    if folder.exists() and any(folder.iterdir()) and not (folder / ENCODER_FILE).is_file():
        raise UserError(f"{folder} is not empty and not an export of l2v; choose another folder")


@contextlib.contextmanager
def whole_export(folder: Path) -> Iterator[Path]:
    """Gives a folder to write to, next to `folder`, which it becomes or replaces when the block ends without an error.

    Raises:
        UserError: as in `check_free`, or it cannot be written.
    """
    check_free(folder)
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield partial
        follow_umask(partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)


def export(
    model: PackedDecoder, texts: TextTokenizer, folder: Path, lineage: dict[str, Any], instructions: Instructions, *,
    normalize: bool = True, licence: str | None = None, matryoshka: Sequence[int] = (), engines: Sequence[str] | None = None,
) -> list[Report]:  # fmt: skip
    """Write `folder` completely or not at all; an existing folder is replaced only if it is an export of l2v.

    licence: the base's, whose papers (`l2v.model.licence`) go into the folder. matryoshka: the prefix lengths that it was
    trained on. engines: those that have to give its vectors (`ENGINES`). Returns which engine gives which vectors from it.

    Raises:
        UserError: the folder holds something else, cannot be written, or an engine cannot express the encoder:
            sentence-transformers, or one of `engines`.
    """
    check_engines(engines or ())
    with whole_export(folder) as partial:
        keys = keys_to_state(model) | ({"matryoshka_dimensions": list(matryoshka)} if matryoshka else {})
        save_config(model.decoder, partial, keys)
        _write(model, texts, partial, lineage, instructions, normalize, matryoshka)
        found = reports(partial)  # before the weights, which take the time
        if refused := [each for each in found if each.name in (engines or ()) and each.refused]:
            raise UserError(f"{refused[0].name} cannot serve this encoder: {refused[0].refused}")
        save_weights(model.decoder, partial, keys)
        write_papers(licence or "", partial, changed=_changes(model, lineage), source=_folder_of(lineage))
    return found


def _write(
    model: PackedDecoder, texts: TextTokenizer, folder: Path, lineage: dict[str, Any], instructions: Instructions,
    normalize: bool, matryoshka: Sequence[int],
) -> None:  # fmt: skip
    known = [text for side in SIDES for text in getattr(instructions, side) if text]
    framed = write_tokenizer(texts, model.pooling, list(dict.fromkeys(known)), folder)
    if framed.exclude and framed.template.prefix and model.pooling in ("weighted_mean", "first"):
        raise UserError(
            f"pooling {model.pooling} after a template's header does not exist in sentence-transformers; use mean, or "
            "pool_prompt: true"
        )
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ][: 3 if normalize else 2]
    _json(folder / "modules.json", modules)
    settings = _prompts(framed, instructions, model.pooling) | {"similarity_fn_name": "cosine"}
    _json(folder / "1_Pooling" / "config.json", _pooling(model, framed, settings["prompts"].values()))
    if normalize:
        (folder / "2_Normalize").mkdir()
    _json(folder / "config_sentence_transformers.json", settings)
    _json(folder / "sentence_bert_config.json", {"max_seq_length": texts.length, "do_lower_case": False})
    facts = encoder_facts(
        model, texts, framed.template, lineage, instructions, normalize=normalize, matryoshka=matryoshka
    )
    _json(folder / ENCODER_FILE, facts | {"strips": framed.strips})


def _changes(model: PackedDecoder, lineage: dict[str, Any]) -> str:
    adapters = len(lineage["merged"])
    merged = f"; {adapters} LoRA adapter{'s' if adapters > 1 else ''} merged into its weights" if adapters else ""
    return (
        f"It was exported by l2v as an encoder with {'causal' if model.causal else 'bidirectional'} attention{merged}."
    )


def _folder_of(lineage: dict[str, Any]) -> Path | None:
    """The folder of the base that was exported, if it is one."""
    folder = Path(resolve(lineage["base"]["model"]))
    return folder if folder.is_dir() else None


def encoder_facts(
    model: PackedDecoder, texts: TextTokenizer, template: Template, lineage: dict[str, Any], instructions: Instructions, *,
    normalize: bool, matryoshka: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """What `Encoder.from_pretrained` needs to know beside a checkpoint. template: what tokenizer and prompts leave to it."""
    return {
        "template": asdict(template),
        "pooling": model.pooling,
        "attention": "causal" if model.causal else "bidirectional",
        "length": texts.length,
        "precision": "bf16" if "bfloat16" in str(model.decoder.dtype) else "fp32",
        "instructions": asdict(instructions),
        "pooled": texts.pooled,
        "normalize": normalize,
        "matryoshka": list(matryoshka),
        "lineage": lineage,
    }


def _pooling(model: PackedDecoder, framed: Framed, prompts: Iterable[str]) -> dict[str, Any]:
    """The file of the pooling module, in both spellings: a key for each mode (sentence-transformers up to 5.3, vLLM up to
    0.23, Text Embeddings Inference, which requires them) and the mode's name (the newer versions).

    vLLM up to 0.23 takes the one key that is true, so `include_prompt` is written only where it is false. sentence-transformers
    up to 5.3 refuses the newer name of the width. It counts prompts without white space at their ends, and a line break there
    would be pooled: such an export has the newer name, so that it fails there, and any other one the older name.
    """
    used = POOLING_MODES[model.pooling]
    width = model.decoder.config.get_text_config().hidden_size
    modes = {key: mode == used for mode, key in POOLING_KEYS.items()}
    template = framed.template
    known = [*prompts, template.prefix + template.instruction.format(instruction="a")]
    stripped = framed.exclude and any(prompt.rstrip(" ") != prompt.strip() for prompt in known)
    facts = {"embedding_dimension" if stripped else "word_embedding_dimension": width, **modes, "pooling_mode": used}
    return facts | ({"include_prompt": False} if framed.exclude else {})


def _prompts(framed: Framed, instructions: Instructions, pooling: str) -> dict[str, Any]:
    """The prompts of sentence-transformers: `encode` has none but the template's header, as `Encoder.encode`.

    Its `encode_query` and `encode_document` add the instruction of the training, if there is one; a task by its name adds that
    task's, if training had it. It weights tokens by their place behind the prompt, so a pooling by place has no prompt
    unless it is pooled.
    """
    template, placed = framed.template, framed.exclude and pooling not in ("mean", "last")
    header = template.prefix
    prompts: dict[str, str] = {}

    def prompt(instruction: str | None) -> str:
        return header + (template.instruction.format(instruction=instruction) if instruction and not placed else "")

    for side in SIDES:
        prompts[side] = prompt(None if instructions.unclear(side) else instructions.one(side))
    for name, task in TASKS.items():
        if task.query in instructions.query and not placed:
            prompts[name] = prompt(task.query)
    if prompts["document"] == header:
        return {"prompts": prompts, "default_prompt_name": "document" if header else None}
    return {"prompts": prompts | {"plain": header}, "default_prompt_name": "plain" if header else None}


def _json(file: Path, value: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
