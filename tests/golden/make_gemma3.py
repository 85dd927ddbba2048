"""Write the golden values of tests/golden/gemma3: a tiny Gemma 3 with two adapters, by plain transformers and PEFT.

`python tests/golden/make_gemma3.py` was run once. It uses none of l2v's own code. The base states no direction, as Gemma 3 does;
the values are those of its own flag, `use_bidirectional_attention`: texts are longer than the window, which is then 3 tokens to
each side. Four query heads share a key head, a local layer comes before a global one, and embeddings are tied.
"""

import json

import torch
from make import HERE as GOLDEN
from make import TARGETS, embed, gradients, named, padded
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

HERE = GOLDEN / "gemma3"


def bidirectional() -> Gemma3ForCausalLM:
    """The base, its file read as one that has the flag."""
    facts = json.loads((HERE / "base" / "config.json").read_text()) | {"use_bidirectional_attention": True}
    config = Gemma3TextConfig(**facts)
    return Gemma3ForCausalLM.from_pretrained(HERE / "base", config=config, attn_implementation="eager").eval()


def write_models() -> None:
    """The base and two adapters, all random; norms lie around the 0 that stands for 1."""
    torch.manual_seed(12)
    config = Gemma3TextConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=20, sliding_window=6, max_position_embeddings=128,
        layer_types=["sliding_attention", "full_attention"], initializer_range=0.1, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(HERE / "base")
    (HERE / "base" / "generation_config.json").unlink()
    for name in ("mntp_adapter", "contrastive_adapter"):
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, lora_dropout=0.0)
        adapter = get_peft_model(bidirectional().model, lora)
        for parameter_name, parameter in adapter.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.05)
        adapter.peft_config["default"].base_model_name_or_path = "base"
        adapter.save_pretrained(HERE / name)
        (HERE / name / "README.md").unlink(missing_ok=True)


def encoder() -> PeftModel:
    """The base with the first adapter merged and the second on it, trainable."""
    merged = PeftModel.from_pretrained(bidirectional().model, HERE / "mntp_adapter").merge_and_unload()
    return PeftModel.from_pretrained(merged, HERE / "contrastive_adapter", is_trainable=True)


def hidden_case(generator: torch.Generator) -> dict[str, torch.Tensor]:
    part = padded(generator, 3, 16, 0)
    with torch.no_grad():
        hidden = bidirectional().model(input_ids=part["input_ids"], attention_mask=part["attention_mask"])[0]
    return named("hidden", part) | {"hidden.last_hidden_state": hidden}


def mntp_case(generator: torch.Generator) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    causal_lm = bidirectional()
    causal_lm.model = PeftModel.from_pretrained(causal_lm.model, HERE / "mntp_adapter", is_trainable=True)
    ids = torch.randint(3, 90, (4, 18), generator=generator)
    hide = torch.rand(4, 18, generator=generator) < 0.3
    hide[:, 1] = True
    labels = ids.where(hide, -100)
    shown = ids.where(~hide, 4)
    logits = causal_lm.lm_head(causal_lm.model(input_ids=shown)[0])
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    tensors = {"mntp.input_ids": shown, "mntp.labels": labels} | gradients("mntp", causal_lm.model)
    return tensors, {"mntp.loss": loss.item()}


def contrastive_case(generator: torch.Generator) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    tensors: dict[str, torch.Tensor] = {}
    parts = [padded(generator, 6, 15 + at, 2) for at in range(3)]
    for column, part in zip("qdn", parts, strict=True):
        tensors |= named(f"triplets.{column}", part)
    model = encoder()
    queries, *documents = (F.normalize(embed(model, part), dim=-1) for part in parts)
    loss = F.cross_entropy(20.0 * queries @ torch.cat(documents).T, torch.arange(len(queries)))
    loss.backward()
    return tensors | gradients("triplets", model), {"triplets.loss": loss.item(), "triplets.scale": 20.0}


def main() -> None:
    write_models()
    generator = torch.Generator().manual_seed(6)
    tensors = hidden_case(generator)
    scalars: dict[str, float] = {}
    for case in (mntp_case, contrastive_case):
        more, values = case(generator)
        tensors |= more
        scalars |= values
    save_file({k: v.contiguous() for k, v in tensors.items()}, HERE / "cases.safetensors")
    (HERE / "cases.json").write_text(json.dumps(scalars, indent=1) + "\n")


if __name__ == "__main__":
    main()
