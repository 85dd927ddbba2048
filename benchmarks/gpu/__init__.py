"""A short stay on a machine with a GPU: what to run there, in which order, and what to bring back (`benchmarks/gpu.sh`)."""
