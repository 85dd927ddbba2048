"""The choices of a caller of attention."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The keyword arguments of `l2v_kernels.attention` of the same names, `scale` filled in."""

    scale: float
    dropout_p: float = 0.0
    stream: int = 0
    causal: bool = False
    window: int | None = None
    softcap: float | None = None
