"""Checkpoints that other tools quantized, read as codes and scales."""
