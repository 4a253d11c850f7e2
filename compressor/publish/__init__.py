"""Artifacts as others get them: complete directories, model cards, uploads to the Hub."""
