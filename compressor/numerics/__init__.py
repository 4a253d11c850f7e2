"""Integer grids, schemes, packing and low-bit linears; nothing here knows of models."""
