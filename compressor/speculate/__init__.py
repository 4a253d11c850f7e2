"""Speculative decoding: drafts trained on what the target itself says, and verified decoding."""
