"""How far FP8 takes the matmuls of a decoder's linears from the exact ones, on its own activations and gradients.

Next to what `l2v_kernels.fp8` does, what it might do instead: gradients in e5m2, scales that bring the largest number to 448
exactly, weights for the gradient with their own scales.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import nn

from l2v.batch import Segment, pack
from l2v.data.tokens import as_ids
from l2v.encoder import Encoder
from l2v.model.packed import PackedDecoder
from l2v_kernels.fp8 import Fp8Weight, quantize_rows

COLUMNS = {
    "weights": "weights",
    "inputs": "inputs",
    "product": "matmul",
    "product_exact_scales": "with exact scales",
    "gradient": "input gradient",
    "gradient_exact_scales": "with exact scales",
    "gradient_e5m2": "in e5m2",
}


def matmul_errors(encoder: Encoder, texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """{linear: {column: error}}: norm of the difference over the norm, the mean over layers. fp32 throughout.

    The gradient is that of a random projection of the pooled vectors, as a contrastive loss gives one.
    """
    inner = encoder.model.decoder
    inputs, gradients, hooks = {}, {}, []
    linears = {n: m for n, m in inner.named_modules() if isinstance(m, nn.Linear)}

    def keep(name: str) -> Callable:
        def hook(_, args, output):
            inputs[name] = args[0].detach().flatten(0, -2)
            output.register_hook(lambda g: gradients.__setitem__(name, g.detach().flatten(0, -2)))

        return hook

    hooks += [module.register_forward_hook(keep(name)) for name, module in linears.items()]
    embed = inner.get_input_embeddings()
    hooks.append(embed.register_forward_hook(lambda _, __, output: output.requires_grad_()))
    ids, starts, _ = encoder.tokenizer.embedded(list(texts), None)
    batch = pack([Segment(as_ids(i), start) for i, start in zip(ids, starts, strict=True)])
    model = PackedDecoder(inner, causal=encoder.model.causal, pooling=encoder.model.pooling, layers="plain").eval()
    vectors_SE = model(batch.to(embed.weight.device), "vectors")
    weight_SE = torch.randn(vectors_SE.shape, generator=torch.Generator().manual_seed(0)).to(vectors_SE.device)
    (nn.functional.normalize(vectors_SE, dim=-1) * weight_SE).sum().backward()
    for hook in hooks:
        hook.remove()
    found = defaultdict(list)
    for name, module in linears.items():
        found[name.rsplit(".", 1)[-1]].append(_errors(module.weight.detach().float(), inputs[name], gradients[name]))
    return {kind: {c: sum(e[c] for e in errors) / len(errors) for c in COLUMNS} for kind, errors in found.items()}


def _errors(weight_NK: torch.Tensor, x_TK: torch.Tensor, dy_TN: torch.Tensor) -> dict[str, float]:
    x_TK, dy_TN = x_TK.float(), dy_TN.float()
    y_TN, dx_TK = x_TK @ weight_NK.t(), dy_TN @ weight_NK
    ours = Fp8Weight.of([weight_NK])
    w_NK, scale_N = ours.dequantized(), ours.scale_O
    exact_NK, exact_N = _to_largest(weight_NK)
    folded = _dequantized(*quantize_rows(dy_TN, scale_N))
    folded_exact, row_T = _to_largest(dy_TN * exact_N)
    return {
        "weights": _distance(w_NK, weight_NK),
        "inputs": _distance(_dequantized(*quantize_rows(x_TK)), x_TK),
        "product": _distance(_dequantized(*quantize_rows(x_TK)) @ w_NK.t(), y_TN),
        "product_exact_scales": _distance(_dequantized(*_to_largest(x_TK)) @ _dequantized(exact_NK, exact_N).t(), y_TN),
        "gradient": _distance(folded @ ours.rows_OE.float(), dx_TK),
        "gradient_exact_scales": _distance(_dequantized(folded_exact, row_T) @ exact_NK.float(), dx_TK),
        "gradient_e5m2": _distance(_dequantized(*_to_e5m2(dy_TN * scale_N)) @ ours.rows_OE.float(), dx_TK),
    }


def _dequantized(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return q.float() * scale[:, None]


def _to_largest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 with scales that bring the largest number of a row to 448 itself."""
    scale = (x.abs().amax(1) / 448).clamp(min=1e-30)
    return (x / scale[:, None]).to(torch.float8_e4m3fn), scale


def _to_e5m2(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e5m2 under the scales of ours, 2^7 lower: its largest number is 57,344 = 448 * 2^7."""
    _, scale = quantize_rows(x)
    scale = scale / 128
    return (x / scale[:, None]).to(torch.float8_e5m2), scale


def _distance(found: torch.Tensor, want: torch.Tensor) -> float:
    return float((found - want).norm() / want.norm())
