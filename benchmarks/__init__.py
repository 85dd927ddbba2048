"""Benchmarks and the commands that measure or describe the kernels. Never imported by l2v or l2v_kernels."""
