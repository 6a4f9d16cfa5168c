"""What each site of the model does: sites, modes, plans, fake quantization, the quantized ViT."""
