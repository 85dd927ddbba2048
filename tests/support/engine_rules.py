"""Text Embeddings Inference and vLLM as their documentation has them read an export: file by file, key by key.

Neither runs here. What they read decides their vectors, so that is written out: which keys are required, which of them gives the
direction, what is pooled, what is added to a text. The model itself is transformers', with the direction and the rotary base that
were read. Sources: the configuration structs and routers of Text Embeddings Inference, vLLM's model configuration.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel


class Refused(Exception):
    """The engine does not start, or has no such feature."""


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def need(facts: dict, keys: dict[str, type | tuple]) -> None:
    for key, kind in keys.items():
        if not isinstance(facts.get(key), kind):
            raise Refused(f"missing field `{key}`")


class Rules:
    """Common to both: everything is tokenised with the special tokens of tokenizer.json, everything is pooled."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, read(folder, "config.json")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.length = self.limit()
        self.how = self.pooling()
        bidirectional = self.bidirectional()
        config = AutoConfig.from_pretrained(folder)
        self.rotary(config)
        self.direct(config, bidirectional)
        self.model = AutoModel.from_pretrained(
            folder, config=config, attn_implementation="eager", dtype=torch.float32
        ).eval()

    def direct(self, config, bidirectional: bool) -> None:
        """Gemma 3 sees half its window to each side, whatever else the file says."""
        if config.model_type != "gemma3_text":
            config.is_causal = not bidirectional
            return
        vars(config).pop("is_causal", None)
        window = self.config["sliding_window"]
        config.use_bidirectional_attention = bidirectional
        config.sliding_window = window // 2 + 1 if bidirectional else window

    def limit(self) -> int:
        file = self.folder / "sentence_bert_config.json"
        return (
            read(self.folder, file.name)["max_seq_length"] if file.exists() else self.config["max_position_embeddings"]
        )

    def rotary(self, config) -> None:
        """What of the rotary embedding is read."""

    @torch.no_grad()
    def encode(self, texts: list[str], dimensions: int | None = None) -> torch.Tensor:
        """float32 [texts, width], of length 1."""
        self.check_dimensions(dimensions)
        self.tokenizer.enable_truncation(self.length)
        out = []
        for text in texts:
            hidden_TE = self.model(input_ids=torch.tensor([self.tokenizer.encode(text).ids]))[0][0]
            out.append({"mean": hidden_TE.mean(0), "last": hidden_TE[-1], "cls": hidden_TE[0]}[self.how])
        return torch.nn.functional.normalize(torch.stack(out)[:, :dimensions], dim=-1)

    def check_dimensions(self, dimensions: int | None) -> None:
        """Whether fewer dimensions can be asked for."""


TEI_KEYS: dict[str, type | tuple] = {
    **dict.fromkeys(
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), int
    ),
    **dict.fromkeys(("num_key_value_heads", "max_position_embeddings"), int),
    **{"hidden_act": str, "rms_norm_eps": float, "rope_theta": (int, float)},
}
"""Of its structs for Llama, Mistral, Qwen2 and Qwen3."""


TEI_GEMMA3: dict[str, type | tuple] = {
    "attention_bias": bool, "pad_token_id": int, "hidden_activation": str, "query_pre_attn_scalar": int,
    "rope_local_base_freq": (int, float), "_sliding_window_pattern": int,
}  # fmt: skip
"""Of its struct for Gemma 3, next to those above but `hidden_act`."""


class Tei(Rules):
    """Text Embeddings Inference. One text at a time: where all texts of a batch have one length, its Gemma 3 has no window."""

    def pooling(self) -> str:
        modes = read(self.folder, "1_Pooling/config.json")
        if self.config["model_type"] == "gemma3_text" and not modes.get("pooling_mode_mean_tokens"):
            raise Refused("only mean pooling is supported for Gemma3")
        need(modes, dict.fromkeys(("pooling_mode_cls_token", "pooling_mode_mean_tokens"), bool))
        need(modes, dict.fromkeys(("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens"), bool))
        if modes["pooling_mode_cls_token"]:
            return "cls"
        if modes["pooling_mode_mean_tokens"]:
            return "mean"
        if modes.get("pooling_mode_lasttoken"):
            return "last"
        raise Refused("pooling config is not supported")

    def bidirectional(self) -> bool:
        keys = {
            key: kind
            for key, kind in TEI_KEYS.items()
            if key != "hidden_act" or self.config["model_type"] != "gemma3_text"
        }
        need(self.config, {"architectures": list, "model_type": str} | keys)
        kind = self.config["model_type"]
        if kind == "gemma3_text":
            need(self.config, TEI_GEMMA3)
            return True  # the only direction of its code
        if kind not in ("llama", "mistral", "qwen2", "qwen3"):
            raise Refused(f"no model {kind}")
        if kind == "qwen2":
            return self.config.get("is_causal") is False
        return self.config.get("use_bidirectional_attention") is True

    def rotary(self, config) -> None:
        if config.model_type == "gemma3_text":
            step = self.config["_sliding_window_pattern"]
            config.layer_types = [
                "full_attention" if at % step == 0 else "sliding_attention"
                for at in range(1, config.num_hidden_layers + 1)
            ]
            for kind, key in (("full_attention", "rope_theta"), ("sliding_attention", "rope_local_base_freq")):
                config.rope_parameters[kind] = {"rope_type": "default", "rope_theta": self.config[key]}
            return
        config.rope_parameters = {"rope_type": "default", "rope_theta": self.config["rope_theta"]}


class Vllm(Rules):
    """vLLM from 0.24 on."""

    def pooling(self) -> str:
        modes = read(self.folder, "1_Pooling/config.json")
        found = {"mean": "mean", "lasttoken": "last", "cls": "cls"}.get(modes.get("pooling_mode"))
        return found or self.by_flags(modes)

    def by_flags(self, modes: dict) -> str:
        """The first key that is true; without one, the last token, as for every decoder."""
        name = next((key for key, value in modes.items() if value is True), None)
        known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last", "pooling_mode_cls_token": "cls"}
        if name is None:
            return "last"
        if name not in known:
            raise Refused(f"no pooling {name}")
        return known[name]

    def bidirectional(self) -> bool:
        if self.config["model_type"] == "gemma3_text":
            return self.config.get("use_bidirectional_attention") is True
        return self.config["model_type"] in ("llama", "qwen2", "qwen3") and self.config.get("is_causal") is False

    def check_dimensions(self, dimensions: int | None) -> None:
        allowed = self.config.get("matryoshka_dimensions")
        if dimensions is not None and not allowed and not self.config.get("is_matryoshka"):
            raise Refused("the model does not support matryoshka representation")
        if dimensions is not None and allowed and dimensions not in allowed:
            raise Refused(f"only {allowed} dimensions")


class OldVllm(Vllm):
    """vLLM up to 0.23, which does not know the mode's name."""

    def pooling(self) -> str:
        return self.by_flags(read(self.folder, "1_Pooling/config.json"))
