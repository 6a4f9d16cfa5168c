"""Float Vision Transformers and calibrated checkpoints: geometry, names, strict loading, saving."""
