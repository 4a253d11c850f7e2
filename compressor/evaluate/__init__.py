"""Quality: what a compressed model lost against its baseline."""
