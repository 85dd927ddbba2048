"""A GPU that does nothing, for counting what the CUDA path does on a machine without a GPU.

A stub (stub/) answers the CUDA runtime, the driver, cuBLAS and NCCL. Under it the real CUDA build of torch, Triton and
DeepSpeed run; kernels are compiled and counted, and not run. `python -m tests.nullgpu --help` lists the commands.
"""
