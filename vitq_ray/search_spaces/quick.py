"""One setting of each calibrator in both of FasterTransformer's common modes: 8 settings.

python scripts/tune_calib.py --search-space search_spaces/quick.py

Not measured apart: a sixth of `calib.py`.
"""

SPACE = {
    "mode": ("ft1", "ft2"),
    "calibrator": ("max", "mse", "entropy", "percentile"),
    "percentile": (99.99,),
    "num_batches": (8,),
}
