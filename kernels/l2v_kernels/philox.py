"""Counter-based random numbers: each is a pure function of its key and counter, so repacking changes no mask.

Philox4x32 with 7 rounds (Salmon, Moraes, Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC
2011), the fewest rounds of it that pass BigCrush. Bit-identical with `tl.philox(..., n_rounds=7)`.

The key is a segment's 64-bit seed, the counter is (column // 16, row, stream, domain). One call gives 16 bytes, one for
each of 16 consecutive columns.
"""

import sys

import torch

ROUNDS = 7
COLUMNS_PER_CALL = 16

DOMAIN_DROPOUT = 0
DOMAIN_ATTENTION = 1
"""Attention uses `head << 8 | DOMAIN_ATTENTION`, so that every query head has its own mask."""
DOMAIN_MASKING = 2

_MASK32 = 0xFFFFFFFF
_MULTIPLIER_A, _MULTIPLIER_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85

# Below torch's grain size of 32,768 elements an op stays on the calling thread, and its temporaries (192 KB each) in that
# core's L2 cache. Measured on 2 cores: 1.2 ns a byte, 1.5 at two thirds of this size, 2 at a third. Larger chunks on two
# threads reach 0.6, but the threads synchronise after each of about 80 short ops: with other work on the cores a byte then
# took up to 260 ns.
_CALLS_ON_CPU = 24576
_CALLS_ON_DEVICE = 1 << 24


def philox4x32(
    key_lo: torch.Tensor | int,
    key_hi: torch.Tensor | int,
    c0: torch.Tensor | int,
    c1: torch.Tensor | int,
    c2: torch.Tensor | int,
    c3: torch.Tensor | int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four random 32-bit words for each key and counter.

    Args:
        key_lo, key_hi, c0, c1, c2, c3: integers or int64 tensors whose shapes broadcast together; only the low 32 bits of
            each count.

    Returns:
        Four int64 tensors of the broadcast shape, with values from 0 to 2**32 - 1.

    Source: Random123, philox4x32-7 (Salmon et al. 2011).
    """
    device = next((x.device for x in (key_lo, key_hi, c0, c1, c2, c3) if isinstance(x, torch.Tensor)), None)
    words = _words32((key_lo, key_hi, c0, c1, c2, c3), device)
    shape = torch.broadcast_shapes(*(word.shape for word in words))
    w0, w1, w2, w3 = ((word & _MASK32).expand(shape) for word in _philox_loose(*words))
    return w0, w1, w2, w3


def keep_bytes(
    seeds: torch.Tensor, rows: torch.Tensor, n_columns: int, stream: int, domain: torch.Tensor | int
) -> torch.Tensor:
    """Random bytes: the byte at (i, column) depends on seeds[i], rows[i], column, stream and domain[i] alone.

    Args:
        seeds: int64 [...], all 64 bits count.
        rows: integers [...]; seeds, rows and domain broadcast together.
        n_columns: how many bytes for each seed and row, at least 0.
        stream: from 0 to 2**32 - 1.
        domain: an integer, or integers [...].

    Returns:
        uint8 [..., n_columns], not contiguous unless n_columns is a multiple of 16. Column j is byte j % 4 (lowest first)
        of word (j % 16) // 4 of the call with c0 = j // 16.

    Raises:
        ValueError: stream or n_columns is out of range.
    """
    if not 0 <= stream <= _MASK32 or n_columns < 0:
        raise ValueError(f"stream must fit 32 bits and n_columns must not be negative, got {stream=}, {n_columns=}")
    device = seeds.device
    domain = torch.as_tensor(domain, dtype=torch.int64, device=device)
    shape = torch.broadcast_shapes(seeds.shape, rows.shape, domain.shape)
    n_rows = shape.numel()
    n_calls = -(-n_columns // COLUMNS_PER_CALL)
    if n_rows == 0 or n_calls == 0:
        return torch.empty((*shape, n_columns), dtype=torch.uint8, device=device)

    flat_seeds = seeds.expand(shape).reshape(n_rows)
    flat_rows = rows.expand(shape).reshape(n_rows)
    flat_domain = domain.expand(shape).reshape(n_rows) if domain.ndim else domain.expand(n_rows)
    blocks = torch.arange(n_calls, device=device).unsqueeze(1)
    out = torch.empty((n_rows, n_calls, 4), dtype=torch.int32, device=device)
    step = max(1, (_CALLS_ON_CPU if device.type == "cpu" else _CALLS_ON_DEVICE) // n_calls)
    for start in range(0, n_rows, step):
        part = slice(start, start + step)
        seed = flat_seeds[part]
        # Blocks come first and rows last: a row's key, counter and domain then broadcast along contiguous memory.
        words = _philox_loose(*_words32((seed, seed >> 32, blocks, flat_rows[part], stream, flat_domain[part]), device))
        for i, word in enumerate(words):
            out[part, :, i] = word.t()
    if sys.byteorder != "little":
        raise NotImplementedError("l2v_kernels reads bytes out of words and supports little-endian machines only")
    return out.view(torch.uint8).view(*shape, n_calls * COLUMNS_PER_CALL)[..., :n_columns]


def threshold(p: float) -> int:
    """The drop probability p in steps of 1/256: an element is kept if its byte is at least this number.

    The kept fraction is (256 - threshold) / 256 and survivors are scaled by its inverse, so the expectation
    is exact for the probability used: p = 0.05 becomes 13/256 = 0.0508, p = 0.3 becomes 77/256 = 0.3008.

    Raises:
        ValueError: p is negative, or rounds to 1.
    """
    value = round(p * 256) if 0 <= p < 1 else 256
    if value == 256:
        raise ValueError(f"a drop probability must be at least 0 and at most 255/256 after rounding, got {p}")
    return value


def keep_scale(p: float) -> float:
    """The factor of what is kept, 256 / (256 - threshold(p)). Raises as `threshold` does."""
    return 256 / (256 - threshold(p))


def _words32(values, device):
    return [torch.as_tensor(value, dtype=torch.int64, device=device) & _MASK32 for value in values]


def _philox_loose(key_lo, key_hi, c0, c1, c2, c3):
    """The rounds. Inputs int64 within 32 bits; of the results only the low 32 bits are meaningful."""
    for index in range(ROUNDS):
        product_a, product_b = c0 * _MULTIPLIER_A, c2 * _MULTIPLIER_B
        if index < 3:
            # Inputs differ in shape: what depends on the column alone, or the row alone, is computed once.
            c0 = ((product_b >> 32) ^ c1 ^ key_lo) & _MASK32
            c2 = ((product_a >> 32) ^ c3 ^ key_hi) & _MASK32
        else:
            # After three rounds c0 and c2 depend on every input, so they have the full shape and are reused.
            torch.bitwise_right_shift(product_b, 32, out=c0)
            c0.bitwise_xor_(c1).bitwise_xor_(key_lo).bitwise_and_(_MASK32)
            torch.bitwise_right_shift(product_a, 32, out=c2)
            c2.bitwise_xor_(c3).bitwise_xor_(key_hi).bitwise_and_(_MASK32)
        # The low halves stay unmasked: their high bits only ever meet the masks above.
        c1, c3 = product_b, product_a
        if index + 1 < ROUNDS:
            key_lo, key_hi = (key_lo + _WEYL_A) & _MASK32, (key_hi + _WEYL_B) & _MASK32
    return c0, c1, c2, c3
