"""Heads that draw masks: dynamic convolution, mask features, the instance-aware transformer."""
