"""The tests. A package, because another one of this name may be installed and would hide `tests.nullgpu`."""
