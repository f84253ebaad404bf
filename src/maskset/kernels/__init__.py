"""Every fast path: the C library, the Triton kernels, and the operators of PyTorch that run them."""
