"""Models: where they come from, their tensors on disk, and their decoder blocks."""
