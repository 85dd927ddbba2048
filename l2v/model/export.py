"""The merged export: a plain transformers checkpoint, bidirectional by its config, with sentence-transformers files."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from l2v.data.tokens import TextTokenizer
from l2v.errors import UserError
from l2v.files import follow_umask
from l2v.model.embedded import resolve
from l2v.model.export_proof import attention_to_state, save_weights
from l2v.model.licence import write_papers
from l2v.model.packed import PackedDecoder
from l2v.recipe import Template
from l2v.recipe.instructions import SIDES, Instructions

ENCODER_FILE = "l2v_encoder.json"
POOLING_MODES = {"mean": "mean", "weighted_mean": "weightedmean", "last": "lasttoken", "first": "cls"}


def export(
    model: PackedDecoder, texts: TextTokenizer, folder: Path, lineage: dict[str, Any], instructions: Instructions, *,
    normalize: bool = True, licence: str | None = None,
) -> None:  # fmt: skip
    """Write `folder` completely or not at all; an existing folder is replaced only if it is an export of l2v.

    licence: the base's, whose papers (`l2v.model.licence`) go into the folder.

    Raises:
        UserError: the folder holds something else, cannot be written, or sentence-transformers cannot express the encoder.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / ENCODER_FILE).is_file():
        raise UserError(f"{folder} is not empty and not an export of l2v; choose another folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    try:
        _write(model, texts, partial, lineage, instructions, normalize)
        write_papers(licence or "", partial, changed=_changes(model, lineage), source=_folder_of(lineage))
        follow_umask(partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(
    model: PackedDecoder, texts: TextTokenizer, folder: Path, lineage: dict[str, Any], instructions: Instructions,
    normalize: bool,
) -> None:  # fmt: skip
    decoder = model.decoder
    save_weights(decoder, folder, attention=attention_to_state(model))
    tokenizer, template = _tokenizer_that_frames(texts)
    tokenizer.save_pretrained(folder)
    header = template.prefix
    if header and texts.pooled == "text" and model.pooling in ("weighted_mean", "first"):
        raise UserError(
            f"pooling {model.pooling} after a template's header does not exist in sentence-transformers; use mean"
        )
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ][: 3 if normalize else 2]
    width = decoder.config.get_text_config().hidden_size
    pooling = {
        "embedding_dimension": width,
        "pooling_mode": POOLING_MODES[model.pooling],
        "include_prompt": texts.pooled == "all",
    }
    settings = _prompts(template, instructions, model.pooling if texts.pooled == "text" else "mean") | {
        "similarity_fn_name": "cosine"
    }
    _json(folder / "modules.json", modules)
    _json(folder / "1_Pooling" / "config.json", pooling)
    if normalize:
        (folder / "2_Normalize").mkdir()
    _json(folder / "config_sentence_transformers.json", settings)
    _json(folder / "sentence_bert_config.json", {"max_seq_length": texts.length, "do_lower_case": False})
    _json(
        folder / ENCODER_FILE,
        {
            "template": asdict(template),
            "pooling": model.pooling,
            "attention": "causal" if model.causal else "bidirectional",
            "length": texts.length,
            "precision": "bf16" if "bfloat16" in str(decoder.dtype) else "fp32",
            "instructions": asdict(instructions),
            "pooled": texts.pooled,
            "normalize": normalize,
            "lineage": lineage,
        },
    )


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


def _prompts(template: Template, instructions: Instructions, pooling: str) -> dict[str, Any]:
    """The prompts of sentence-transformers: `encode` has none but the template's header, as `Encoder.encode`.

    Its `encode_query` and `encode_document` add the instruction of the training, if there is one. It weights tokens by their
    place behind the prompt, so a pooling by place has no prompt.
    """
    header, prompts = template.prefix, {}
    for side in SIDES:
        known = pooling in ("mean", "last") and instructions.unclear(side) is None
        instruction = instructions.one(side) if known else None
        prompts[side] = header + (template.instruction.format(instruction=instruction) if instruction else "")
    if prompts["document"] == header:
        return {"prompts": prompts, "default_prompt_name": "document" if header else None}
    return {"prompts": prompts | {"plain": header}, "default_prompt_name": "plain" if header else None}


def _tokenizer_that_frames(texts: TextTokenizer) -> tuple[PreTrainedTokenizerBase, Template]:
    """A copy of the tokenizer that adds the template's suffix itself, and the template that remains for the prompt.

    sentence-transformers has prompts, which come before a text and can be excluded from pooling, but nothing after it: so
    the tokenizer appends the suffix. Without a header a BOS token would be pooled, so it becomes the prompt.
    """
    tokenizer, template = copy.deepcopy(texts.tokenizer), texts.template
    if texts.pooled != "text":
        return tokenizer, template  # everything that it adds is pooled
    backend = tokenizer.backend_tokenizer
    if template.suffix:
        ids = tokenizer(template.suffix, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] not in tokenizer.all_special_ids:
            raise UserError(
                f"the template's suffix '{template.suffix}' is not one special token; sentence-transformers cannot append "
                "it, so this encoder cannot be exported"
            )
        token = tokenizer.convert_ids_to_tokens(ids[0])
        append = processors.TemplateProcessing(
            single=f"$A {token}", pair=f"$A $B {token}", special_tokens=[(token, ids[0])]
        )
        before = [backend.post_processor] if backend.post_processor is not None else []
        backend.post_processor = processors.Sequence([*before, append])
        return tokenizer, replace(template, suffix="")
    bos = tokenizer.bos_token
    if not template.prefix and bos and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        # As bos_token, sentence-transformers would treat it as a trailing special token and count a prompt of length 0.
        tokenizer.bos_token = None
        backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
        return tokenizer, replace(template, prefix=bos)
    return tokenizer, template


def _json(file: Path, value: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
