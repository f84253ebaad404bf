"""Mask heads: dynamic convolution, mask features, the instance-aware transformer."""
