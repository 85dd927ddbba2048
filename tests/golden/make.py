"""Write the golden values of tests/golden: a tiny Llama, two adapters, and what plain padded transformers and PEFT give.

`python tests/golden/make.py` was run once. It uses none of l2v's own code, so the packed path is tested against another.
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def bidirectional() -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(HERE / "base", attn_implementation="eager")
    model.config.is_causal = False
    return model.eval()


def padded(generator: torch.Generator, rows: int, longest: int, prompt: int) -> dict[str, torch.Tensor]:
    """Left-padded ids, their mask, and the mask of pooled tokens (without BOS and a prompt of varying length)."""
    lengths = torch.randint(5, longest + 1, (rows,), generator=generator)
    lengths[0] = longest
    ids = torch.randint(3, 90, (rows, longest), generator=generator)
    place = torch.arange(longest)
    mask = (place >= longest - lengths[:, None]).long()
    skip = 1 + torch.randint(0, prompt + 1, (rows,), generator=generator)
    embed = (place >= (longest - lengths + skip)[:, None]).long()
    first = place == (longest - lengths)[:, None]
    return {"input_ids": ids.where(mask.bool(), 0).where(~first, 1), "attention_mask": mask, "embed_mask": embed}


def embed(model, part: dict[str, torch.Tensor], how: str = "mean") -> torch.Tensor:
    hidden = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"])[0]
    mask = part["embed_mask"]
    if how == "eos_token":
        return hidden[:, -1]
    weights = mask.cumsum(1) * mask if how == "weighted_mean" else mask
    return (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)


def write_models() -> None:
    """The base and two adapters, all random."""
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rope_theta=500000.0, initializer_range=0.1,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(HERE / "base")
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


def gradients(name: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of every LoRA tensor, under the names of cases.safetensors."""
    return {
        f"{name}.grad.{key.replace('.default.', '.')}": parameter.grad.clone()
        for key, parameter in model.named_parameters()
        if parameter.grad is not None and "lora_" in key
    }


def named(name: str, part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for key, value in part.items()}


def hidden_case(generator: torch.Generator) -> dict[str, torch.Tensor]:
    part = padded(generator, 3, 12, 0)
    with torch.no_grad():
        hidden = bidirectional().model(input_ids=part["input_ids"], attention_mask=part["attention_mask"])[0]
    return named("hidden", part) | {"hidden.last_hidden_state": hidden}


def mntp_case(generator: torch.Generator) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    causal_lm = bidirectional()
    causal_lm.model = PeftModel.from_pretrained(causal_lm.model, HERE / "mntp_adapter", is_trainable=True)
    ids = torch.randint(3, 90, (4, 16), generator=generator)
    hide = torch.rand(4, 16, generator=generator) < 0.3
    hide[:, 1] = True
    labels = ids.where(hide, -100)
    shown = ids.where(~hide, 4)
    logits = causal_lm.lm_head(causal_lm.model(input_ids=shown)[0])
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    loss.backward()
    tensors = {"mntp.input_ids": shown, "mntp.labels": labels} | gradients("mntp", causal_lm.model)
    return tensors, {"mntp.loss": loss.item()}


def pool_case(generator: torch.Generator) -> dict[str, torch.Tensor]:
    part = padded(generator, 4, 14, 3)
    with torch.no_grad():
        pooled = {f"pool.{how}": embed(encoder(), part, how) for how in ("mean", "weighted_mean", "eos_token")}
    return named("pool", part) | pooled


def contrastive_case(
    generator: torch.Generator, name: str, columns: str, scale: float
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    tensors: dict[str, torch.Tensor] = {}
    parts = [padded(generator, 6, 11 + at, 2) for at in range(len(columns))]
    for column, part in zip(columns, parts, strict=True):
        tensors |= named(f"{name}.{column}", part)
    model = encoder()
    queries, *documents = (F.normalize(embed(model, part), dim=-1) for part in parts)
    scores = scale * queries @ torch.cat(documents).T
    loss = F.cross_entropy(scores, torch.arange(len(queries)))
    loss.backward()
    return tensors | gradients(name, model), {f"{name}.loss": loss.item(), f"{name}.scale": scale}


def main() -> None:
    write_models()
    generator = torch.Generator().manual_seed(5)
    tensors = hidden_case(generator)
    more, scalars = mntp_case(generator)
    tensors |= more | pool_case(generator)
    for name, columns, scale in (("pairs", "qd", 20.0), ("triplets", "qdn", 50.0)):
        more, values = contrastive_case(generator, name, columns, scale)
        tensors |= more
        scalars |= values
    save_file({k: v.contiguous() for k, v in tensors.items()}, HERE / "cases.safetensors")
    (HERE / "cases.json").write_text(json.dumps(scalars, indent=1) + "\n")


if __name__ == "__main__":
    main()
