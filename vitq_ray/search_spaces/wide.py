"""Bits, modes and calibrators for single families of tensors: 360,000 combinations, of which a sample is tried.

python scripts/tune_calib.py --search-space search_spaces/wide.py --search-alg optuna --num-samples 64
python scripts/tune_calib.py --search-space search_spaces/wide.py --search-alg random --num-samples 64

Not measured: with 8 bits in the space, 8 bits win; narrow `act_bits` to the bits that are wanted.
"""

from vitq_ray.search_space import percentiles

_OWN = (None, "max", "mse", "entropy", "percentile 99.9")

SPACE = {
    "mode": ("ft1", "ft2", "ft3", "trt"),
    "calibrator": ("max", "mse", "entropy", "percentile"),
    "percentile": percentiles(99, 99.9999, 5),
    "num_batches": (2, 8, 32),
    "weight_bits": (4, 8),
    "act_bits": (4, 6, 8),
    "attention_probabilities": _OWN,
    "gelu_output": _OWN,
    "gemm_outputs": _OWN,
    "weights": ("max", "mse"),
}
