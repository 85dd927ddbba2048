"""The tokenizer of Llama 3, all 128,256 entries, from the package llama-models (the dev extra)."""

import importlib.util
from pathlib import Path

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
]


def save_tokenizer(folder: Path) -> bool:
    """Write it to a folder, with its BOS post-processor; False if llama-models is not installed."""
    spec = importlib.util.find_spec("llama_models")
    if spec is None:
        return False
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    model = Path(spec.submodule_search_locations[0]) / "llama3" / "tokenizer.model"
    specials = [*SPECIALS, *(f"<|reserved_special_token_{i}|>" for i in range(3, 249))]
    backend = TikTokenConverter(vocab_file=str(model), pattern=PATTERN, extra_special_tokens=specials).converted()
    bos = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B", special_tokens=[("<|begin_of_text|>", 128000)]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|eot_id|>"
    )
    assert len(tokenizer) == 128256
    tokenizer.save_pretrained(folder)
    return True
