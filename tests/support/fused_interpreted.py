"""Run with TRITON_INTERPRET=1: the whole fused layer on its Triton kernels, against the plain layer on the references."""

import support.interpreter  # noqa: F401 (it patches Triton's interpreter)
import torch
from support.fused_cases import FAMILIES, batch, build, distance, gradients
from support.launches import launches
from support.step_cases import poisoned

from l2v.model.lora import trainable
from l2v.recipe import Lora
from l2v_kernels.dispatch import triton_everywhere

SMALL = batch(lengths=(3, 1, 6))

for dtype, bar in ((torch.float32, 1e-5), (torch.float16, 1e-2)):
    # The families differ in what is around the matmuls, which fp16 does not change: the plainest and those with most.
    for family in FAMILIES if dtype == torch.float32 else ("llama", "qwen3", "gemma3_text"):
        kwargs = {"lora": Lora(r=5, alpha=10, dropout=0.1), "attention_dropout": 0.2, "dtype": dtype}
        kwargs["shape"] = {"num_hidden_layers": 2 if family == "llama" else 1}
        if family == "llama" and dtype == torch.float16:
            kwargs["shape"] |= {"head_dim": 32}  # of which RoPE's kernel adds the adapters
        want_hidden, want = gradients(build(family, "plain", **kwargs), SMALL)
        for recompute in ("none", "cheap", "layer") if family == "llama" and dtype == torch.float32 else ("cheap",):
            model = build(family, "fused", recompute=recompute, **kwargs)
            model.fused.stack_weights()
            with triton_everywhere():
                hidden, found = gradients(model, SMALL)
            off = float((hidden.double() - want_hidden.double()).abs().max() / want_hidden.double().abs().max())
            print(f"{family} {dtype} {recompute}: hidden {off:.1e}, gradient {distance(found, want):.1e}")
            assert all(g.isfinite().all() for g in found.values())
            assert off <= bar and distance(found, want) <= bar
            if family == "llama" and dtype == torch.float16:
                names = trainable(model)
                model.flatten_adapters()
                with triton_everywhere(), poisoned(), launches() as kernels:
                    again, flat = gradients(model, SMALL)
                assert torch.equal(again, hidden)
                (whole,) = flat.values()
                for name, gradient in model.flat.split(whole, names).items():
                    assert torch.equal(gradient, found[name]), name
                assert kernels.count("heads_kernel") == 2 and kernels.count("up_sums_kernel") == 8
                assert kernels.count("ordered_sum_kernel") == 1, "the last group's; the others' are added on the way"
