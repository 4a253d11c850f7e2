"""Quantization algorithms, one file each, and the driver that walks a model's blocks."""
