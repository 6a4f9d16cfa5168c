"""What a model gets right, image by image, and which of two models is better."""
