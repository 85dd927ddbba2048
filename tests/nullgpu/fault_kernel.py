"""A kernel that is compiled again for every number of tokens: one of the planted faults."""

import triton
import triton.language as tl


@triton.jit
def zero(out, T: tl.constexpr):
    tl.store(out, T)
