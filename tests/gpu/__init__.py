"""The CUDA kernels: on a GPU, on the simulated one, and as machine code."""
