"""Which engine gives an export's vectors, decided from its files by what each engine reads (docs/serving.md)."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from l2v.errors import UserError

POOLS_EVERYTHING = "it pools every token, and here {what} is not pooled; train with pool_prompt: true"


@dataclass(frozen=True)
class Report:
    """What an engine makes of an export. vectors: which ones it gives, "" if none. refused: why it gives none."""

    name: str
    vectors: str
    refused: str = ""


@dataclass(frozen=True)
class Files:
    """The files of an export, as engines read them. added: the tokens that tokenizer.json puts before a text. instructed: it
    was trained with instructions.
    """

    config: dict[str, Any]
    pooling: dict[str, Any]
    prompts: dict[str, str]
    header: str
    length: int
    added: list[str]
    instructed: bool

    @classmethod
    def read(cls, folder: Path) -> Files:
        """Those of a folder that `l2v.model.export` wrote."""
        config, pooling, settings, limits, own = (
            json.loads((folder / name).read_text(encoding="utf-8"))
            for name in (
                "config.json", "1_Pooling/config.json", "config_sentence_transformers.json", "sentence_bert_config.json",
                "l2v_encoder.json",
            )
        )  # fmt: skip
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        whole, bare = (tokenizer.encode("a", add_special_tokens=add).tokens for add in (True, False))
        before = whole[: next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)]
        prompts, default = settings["prompts"], settings["default_prompt_name"]
        header = prompts[default] if default else ""
        instructed = any(any(found) for found in own["instructions"].values())
        return cls(config, pooling, prompts, header, limits["max_seq_length"], before, instructed)

    @property
    def unpooled(self) -> str:
        """What stands before a text and is not pooled; empty if everything is."""
        if self.pooling.get("include_prompt", True):
            return ""
        if self.header or self.added:
            return f"{self.header + ''.join(self.added)!r} before each text"
        return "the instruction" if self.instructed else ""

    @property
    def one_direction(self) -> bool:
        """Whether it is causal, as every decoder is without a key."""
        return self.config.get("is_causal", True) and not self.config.get("use_bidirectional_attention")

    @property
    def dtype(self) -> str:
        """That of the weights."""
        return self.config.get("dtype") or "float32"

    def prompted(self) -> str:
        """What a client of an engine without default prompts has to do."""
        if self.header:
            return f", if the client puts {self.header!r} before each text"
        return ", if the client puts the instruction before queries" if self.instructed else ""


def _transformers(files: Files) -> Report:
    return Report("transformers", f"hidden states in {files.dtype} from version 5.2 on; older ones refuse to load it")


def _sentence_transformers(files: Files) -> Report:
    since = "5.4" if "embedding_dimension" in files.pooling else "5.3"
    return Report(
        "sentence-transformers",
        f"those of l2v in {files.dtype}, with its prompts; from version {since} with transformers 5.2",
    )


def _pooled_alike(files: Files, known: dict[str, str]) -> str:
    """Why an engine that pools every token gives other vectors; known: its names of poolings."""
    mode = files.pooling["pooling_mode"]
    if mode not in known:
        return f"it has no pooling '{mode}' (it has {', '.join(known.values())})"
    return POOLS_EVERYTHING.format(what=files.unpooled) if files.unpooled else ""


VLLM_DIRECTIONS = {
    "llama": "is_causal", "qwen2": "is_causal", "qwen3": "is_causal", "gemma3_text": "use_bidirectional_attention",
}  # fmt: skip
TEI_DIRECTIONS = {
    "llama": "use_bidirectional_attention",
    "mistral": "use_bidirectional_attention",
    "qwen3": "use_bidirectional_attention",
    "gemma3_text": "use_bidirectional_attention",
    "qwen2": "is_causal",
}
"""The key of config.json that decides the direction, by model_type. Other families are causal there, or not known."""
READS = {"is_causal": False, "use_bidirectional_attention": True}


def _directed(files: Files, directions: dict[str, str]) -> str:
    """Why an engine would run the model in another direction."""
    kind = files.config["model_type"]
    if kind not in directions:
        return f"its code for '{kind}' is not known to read the direction (known: {', '.join(directions)})"
    key = directions[kind]
    if not files.one_direction and files.config.get(key) != READS[key]:
        return f"it reads {key} for '{kind}', and this export cannot state it without changing the vectors elsewhere"
    if kind == "gemma3_text" and files.config.get("is_causal") is False and files.length > _whole(files.config):
        return "with is_causal as well, local layers have another window there"
    return ""


def _whole(config: dict[str, Any]) -> int:
    """Tokens of the longest text that the local layers of a bidirectional Gemma 3 see as a whole."""
    return config["sliding_window"] // 2 + 1


def _vllm(files: Files) -> Report:
    poolings = {"mean": "mean", "lasttoken": "last", "cls": "cls"}
    refused = _directed(files, VLLM_DIRECTIONS) or _pooled_alike(files, poolings)
    if refused:
        return Report("vllm", "", refused)
    cut = files.config.get("matryoshka_dimensions")
    dimensions = f"; dimensions {', '.join(map(str, cut))}" if cut else ""
    return Report("vllm", f"those of l2v in the dtype it runs{files.prompted()}{dimensions}")


def _tei(files: Files) -> Report:
    config, kind = files.config, files.config["model_type"]
    poolings = {"mean": "mean"} | ({} if kind == "gemma3_text" else {"lasttoken": "last-token", "cls": "cls"})
    refused = _directed(files, TEI_DIRECTIONS) or _pooled_alike(files, poolings)
    refused = refused or _unlike_tei(config, files.length)
    if refused:
        return Report("tei", "", refused)
    dtype = "float16, on a GPU" if kind in ("llama", "mistral", "qwen2") else "the dtype it runs"
    return Report("tei", f"those of l2v in {dtype}{files.prompted()}")


def _unlike_tei(config: dict[str, Any], length: int) -> str:
    """What of the architecture Text Embeddings Inference computes in another way."""
    kind = config["model_type"]
    if kind == "gemma3_text":
        return _gemma3_unlike_tei(config, length)
    if kind in ("llama", "mistral"):
        heads = config["hidden_size"] // config["num_attention_heads"]
        if (config.get("head_dim") or heads) != heads:
            return f"it takes heads of hidden_size / num_attention_heads = {heads}, and these have {config['head_dim']}"
        if config.get("attention_bias") or config.get("mlp_bias"):
            return "its Llama and Mistral have no biases (attention_bias, mlp_bias)"
        if config.get("rope_scaling"):
            return "it does not apply rope_scaling to Llama and Mistral"
    window = config.get("sliding_window") if kind == "mistral" or config.get("use_sliding_window") else None
    if window and window < length:
        return f"texts of {length} tokens are longer than the window of {window}, which it applies to the left alone"
    if "rope_theta" not in config:
        return "it needs one rope_theta, and this model has several or none"
    return ""


TEI_GEMMA3 = (
    "attention_bias", "hidden_activation", "pad_token_id", "query_pre_attn_scalar", "rope_local_base_freq", "rope_theta",
    "_sliding_window_pattern",
)  # fmt: skip
"""Keys that it requires of Gemma 3 and that a model may lack."""


def _gemma3_unlike_tei(config: dict[str, Any], length: int) -> str:
    """Its Gemma 3 is bidirectional, whatever a file says, with every so many layers seeing the whole text."""
    if not config.get("use_bidirectional_attention"):
        return "its Gemma 3 has attention in both directions"
    if missing := [key for key in TEI_GEMMA3 if config.get(key) is None]:
        return f"it needs {missing[0]} in config.json, and this model has none"
    if any(rope.get("rope_type", "default") != "default" for rope in config["rope_parameters"].values()):
        return "it does not scale the rotary embedding of Gemma 3"
    if length > (whole := _whole(config)):
        return (
            f"it drops the window of {config['sliding_window']} where all texts of a batch have one length, and texts of up to "
            f"{length} tokens are longer than the {whole} that it spans; export with --length {whole}"
        )
    return ""


ENGINES: dict[str, Callable[[Files], Report]] = {
    "transformers": _transformers,
    "sentence-transformers": _sentence_transformers,
    "vllm": _vllm,
    "tei": _tei,
}
"""The engines that an export can be written for, by the names of `l2v export --for`."""


def check_engines(names: Sequence[str]) -> None:
    """Raises UserError if one of the names is no engine of `ENGINES`."""
    for name in names:
        if name not in ENGINES:
            close = difflib.get_close_matches(name, ENGINES, n=1, cutoff=0.5)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(ENGINES)}"
            raise UserError(f"no engine '{name}'; {hint}")


def reports(folder: Path) -> list[Report]:
    """What every engine makes of the export in `folder`."""
    files = Files.read(folder)
    return [judge(files) for judge in ENGINES.values()]
