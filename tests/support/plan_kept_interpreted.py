"""Run with TRITON_INTERPRET=1: what one layer saves for its backward, on its Triton kernels."""

import numpy as np
import support.interpreter  # noqa: F401 (it patches Triton's interpreter)
import torch

from l2v.batch import Segment, pack
from l2v.model.load import inner_model, load_model
from l2v.model.lora import add_lora
from l2v.model.memory import LayerShape, kept_for_backward
from l2v.model.packed import PackedDecoder
from l2v.recipe import LLAMA_LINEARS, Base, Lora
from l2v_kernels.dispatch import triton_everywhere
from l2v_kernels.lora_linear.kernel_down import DOWN_CONFIG

CONFIG = {
    "model_type": "llama", "vocab_size": 8, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 1,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip

DOWN_CONFIG[2] = DOWN_CONFIG[2] | {
    "BLOCK_E": 2048
}  # the interpreter takes its time by the tile, and tiles save nothing
whole = load_model(Base("fake", init="random", config=CONFIG), head=False, dtype=torch.float16)
decoder = add_lora(inner_model(whole), Lora(), base_name="fake", seed=0)
model = PackedDecoder(decoder, attention_dropout=0.3).train()
batch = pack([Segment(np.arange(n) % 8, example=i) for i, n in enumerate((5, 1, 2))])
shape = LayerShape.of(model.fused.inner.config, rank=16, targets=LLAMA_LINEARS, itemsize=2)
mine = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
layer = model.fused.inner.layers[0]
inside = [False]
layer.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))
layer.register_forward_hook(lambda *_: inside.__setitem__(0, False))

for recompute in ("none", "cheap", "layer"):
    model.set_recompute(recompute)
    saved = {}

    def keep(tensor, saved=saved):
        storage = tensor.untyped_storage()
        if inside[0] and storage.data_ptr() not in mine:
            saved[storage.data_ptr()] = storage
        return tensor

    with triton_everywhere(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(batch, "hidden")
    assert hidden.isfinite().all()
    # A seed for each segment, which all layers share.
    found = sum(storage.nbytes() for storage in saved.values()) - (batch.seeds_S.nbytes if recompute != "layer" else 0)
    want = batch.tokens * sum(kept_for_backward(shape, recompute).values())
    assert found == want, f"{recompute}: {found} bytes saved, {want} in the table"
    print(recompute)
    del hidden
