"""What tests share: cases, the oracle, tolerances, and tools for the CUDA kernels."""
