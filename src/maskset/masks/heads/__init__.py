"""Mask heads: mask features with dynamic convolution, and the instance-aware transformer."""
