"""Published sentence-transformers models as rows, with the prompts, EOS, pooling and length that they were published with."""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

from mteb.models.instruct_wrapper import InstructSentenceTransformerModel
from mteb.models.model_implementations import MODEL_REGISTRY
from mteb.models.model_meta import ModelMeta
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper, sentence_transformers_loader
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from l2v.errors import UserError, first_line
from l2v.evaluation.model import model_meta


def sentence_baseline(name: str, path: str | None = None) -> Any:
    """A sentence-transformers model in mteb's own wrapper, with what l2v asks of a row.

    Prompts and template are those of mteb's metadata where mteb knows the name, else of the model's own files; pooling,
    normalisation and length are those of its files. Its `identity` lists them.

    name: as mteb knows it, on the Hub, or a folder. path: a folder with its weights.

    Raises:
        UserError: it cannot be loaded, or mteb has code of its own for it.
    """
    meta = MODEL_REGISTRY.get(name)
    options = dict(meta.loader_kwargs) if meta else {}
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")  # that mteb's prompts replace those of the files
            wrapped = _load(name, path, meta, options)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--baselines {name}: neither tfidf, nor minilm, nor a sentence-transformers model that can be loaded: "
            f"{first_line(error)}"
        ) from None
    model = wrapped.model
    wrapped.name = Path(name).name if Path(name).is_dir() else name
    wrapped.identity = {
        "baseline": name, "length": model.max_seq_length, "dimension": model.get_embedding_dimension(),
        "pooling": _pooling(model), "eos": _restore_eos(model, bool(options.get("add_eos_token"))),
        "prompts": _plain(options.get("model_prompts") or options.get("prompts_dict") or model.prompts),
        "template": _plain(options.get("instruction_template")), "revision": meta.revision if meta and not path else None,
        **({"weights": _weights(Path(path or name))} if Path(path or name).is_dir() else {}),
    }  # fmt: skip
    wrapped.mteb_model_meta = model_meta(f"l2v/{wrapped.name.replace('/', '-')}", wrapped.identity)
    wrapped.empty, wrapped.batch, wrapped.close = 0, 32, lambda: None
    return wrapped


def _load(name: str, path: str | None, meta: ModelMeta | None, options: dict[str, Any]) -> Any:
    if meta is None or meta.loader is None:
        return SentenceTransformerEncoderWrapper(path or name)
    revision: Any = None if path else meta.revision
    if meta.loader is InstructSentenceTransformerModel:
        return InstructSentenceTransformerModel(path or name, revision, **options)
    if meta.loader in (SentenceTransformerEncoderWrapper, sentence_transformers_loader):
        return SentenceTransformerEncoderWrapper(path or name, revision, **options)
    kind = getattr(meta.loader, "__name__", str(meta.loader))
    raise UserError(
        f"--baselines {name}: mteb runs it with code of its own ({kind}), not with sentence-transformers; serve it and give "
        "URL#MODEL"
    )


def _restore_eos(model: Any, asked: bool) -> str:
    """Whether texts end with EOS: `none`, `theirs`, or `restored` where the model's files ask for it and the tokenizer omits it.

    `add_eos_token` of tokenizer_config.json has no effect on fast tokenizers under transformers 5, so that a model that pools
    the last token would pool another one (e5-mistral).
    """
    tokenizer = model.tokenizer
    eos = getattr(tokenizer, "eos_token_id", None)
    if eos is None:
        return "none"
    ends = tokenizer("a")["input_ids"][-1] == eos
    # From the file: transformers 5 does not keep the key of a class that has no use for it.
    if ends or not (asked or get_tokenizer_config(tokenizer.name_or_path).get("add_eos_token")):
        return "theirs" if ends else "none"
    from tokenizers import processors

    inner = tokenizer.backend_tokenizer
    text = str(tokenizer.eos_token)
    behind = processors.TemplateProcessing(
        single=["$A", text], pair=["$A", text, "$B:1", f"{text}:1"], special_tokens=[(text, eos)]
    )
    before = [inner.post_processor] if inner.post_processor else []
    inner.post_processor = processors.Sequence([*before, behind])
    if tokenizer("a")["input_ids"][-1] != eos:
        raise UserError(
            "its files ask for EOS behind each text (add_eos_token), and its tokenizer cannot be made to add it"
        )
    return "restored"


def _pooling(model: Any) -> str | None:
    for module in model:
        if type(module).__name__ == "Pooling":
            return str(getattr(module, "pooling_mode", None) or module.get_pooling_mode_str())
    return None


def _plain(value: Any) -> Any:
    """A value that JSON has; a function by its name."""
    return getattr(value, "__qualname__", value) if callable(value) else value


def _weights(folder: Path) -> str:
    """A hash of the names, sizes and times of a folder's files: other weights in the folder are another model."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        stat = file.stat()
        digest.update(f"{file.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
