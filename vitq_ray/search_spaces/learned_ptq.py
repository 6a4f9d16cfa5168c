"""As the default space, and every candidate has learned its scales, biases and norms: 16 settings.

python scripts/tune_calib.py --search-space search_spaces/learned_ptq.py --wprec 4 --aprec 4

Needs 4,096 calibration images, without labels: for few bits, small images, and more time than `ptq` takes (half a
minute to a minute per setting of the bundled sample). What `learn` does is gradient descent; no weight of a matrix
product changes. Figures of single settings are in `docs/accuracy.md`; the whole search was not run to its end.
"""

SPACE = {
    "mode": ("ft1", "ft2"),
    "calibrator": ("fisher", "mse"),
    "weights": ("fisher",),
    "num_batches": (512,),
    "transforms": (("rotate", "shift", "heads", "balance"), ("rotate",)),
    "corrections": (("split", "fit", "round", "learn"), ("round", "bias", "learn")),
}
