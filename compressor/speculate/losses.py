"""Losses of drafts against what the target says, and their gradients, a few tokens at a time."""
