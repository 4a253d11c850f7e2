"""Texts for calibration, evaluation and load, tokenised and packed once."""
