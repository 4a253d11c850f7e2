"""Integer grids, schemes, packing and low-bit linears; nothing here knows of models."""

from compressor.numerics import vector_math

vector_math.settle()  # before anything here, or anything that builds on it, computes
