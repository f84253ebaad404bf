"""Kernels, each for one kind of machine, of what `layers` also has in plain PyTorch."""
