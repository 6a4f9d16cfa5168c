"""Quantization-aware training, without Ray."""
