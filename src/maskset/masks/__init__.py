"""Mask targets, painting, resizing, NMS, codecs and heads."""
