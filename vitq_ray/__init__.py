"""Find the best INT8 settings for a Vision Transformer, and prove them."""

__version__ = "0.1.0"
