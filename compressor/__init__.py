"""compressor: compress a language model, and know what it lost and what each token costs."""

__version__ = "0.1.0"
