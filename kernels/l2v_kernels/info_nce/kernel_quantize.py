"""The codes of rows: `quantize.codes` in Triton."""

import triton.language as tl

from l2v_kernels.jit import jit


@jit(do_not_specialize=["n_rows"])
def codes_kernel(
    x_ptr,
    inverse_ptr,
    out_ptr,
    n_rows,
    n_columns,
    x_stride,
    out_stride,
    BINARY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out [r, E] in the dtype of x. inverse fp32 [r]: 1 / step, 0 for a zero vector, NaN for a row with NaN or Inf."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    inverse = tl.load(inverse_ptr + rows, mask=rows < n_rows, other=0.0)[:, None]
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if BINARY:
        code = tl.where(inverse == 0.0, 0.0, tl.where(x > 0.0, 1.0, -1.0) + 0.0 * inverse)
    else:
        code = tl.floor(x * inverse + 0.5)
        # Compared so that NaN stays NaN.
        code = tl.where(code > 127.0, 127.0, tl.where(code < -127.0, -127.0, code))
    tl.store(out_ptr + rows[:, None] * out_stride + columns[None, :], code.to(out_ptr.dtype.element_ty), mask=mask)
