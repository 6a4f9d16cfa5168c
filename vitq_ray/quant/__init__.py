"""Quantization: histograms, amax, fake quantization, modes and the quantized ViT. Plain PyTorch and NumPy."""
