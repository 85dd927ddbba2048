"""Events of the stub: their numbers (stub/nullgpu.h has the same), and the connection to its library."""

from __future__ import annotations

import ctypes
import enum


class Kind(enum.IntEnum):
    """What happened; see the stub's header for the numbers that come with each."""

    KERNEL = 0
    TRITON = 1
    GEMM = 2
    SET = 3
    COPY = 4
    WAIT = 5
    COLLECTIVE = 6
    ALLOCATE = 7
    FREE = 8
    BAD = 9
    UNMODELLED = 10


LAUNCHES = (Kind.KERNEL, Kind.TRITON, Kind.GEMM, Kind.SET, Kind.COPY, Kind.COLLECTIVE)
"""What a GPU would be given to do: each costs the host a launch."""
DIRECTIONS = ("host to host", "host to device", "device to host", "device to device")
HOOK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_long)


class Stub:
    """The library in this process, which the loader has put before all others."""

    def __init__(self) -> None:
        self.stub = ctypes.CDLL(None)
        self.stub.nullgpu_count.restype = ctypes.c_long

    def counts(self) -> list[int]:
        """Events so far, a number for each Kind."""
        return [self.stub.nullgpu_count(kind.value) for kind in Kind]

    def set_hook(self, hook) -> None:
        """Call `hook`, a HOOK, at every event but ALLOCATE and FREE; None ends it. The caller keeps it alive."""
        self.stub.nullgpu_set_hook(hook if hook is not None else ctypes.cast(None, HOOK))

    def set_byte_read(self, value: int) -> None:
        """What a copy of one byte from the device gives: 1 makes `torch.equal(...)` true."""
        self.stub.nullgpu_set_byte_read(value)
