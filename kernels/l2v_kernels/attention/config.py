"""Tile shapes and launch parameters."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    """block_m rows (query token, query head) by block_n keys a step, with Triton's warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def meta(self) -> dict[str, int]:
        """As a launch's keyword arguments."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def choose(kind, q_THD, tables, settings):
    return Config(32, 32, 4, 1)
