SPACE = {
    "mode": ("ft1", "ft2"),
    "calibrator": ("max", "percentile"),
    "percentile": (90.0, 99.0),
    "num_batches": (1, 3),
    "act_bits": (4, 6),
    "gelu_output": (None, "mse"),
}
