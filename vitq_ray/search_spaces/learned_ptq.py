"""As the default space, and every candidate has learned its scales, biases and norms: 16 settings.

python scripts/tune_calib.py --search-space search_spaces/learned_ptq.py --wprec 4 --aprec 4

Needs 4,096 calibration images, without labels: for few bits, small images, and more time than `ptq` takes (a
minute per setting of the bundled sample). What `learn` does is gradient descent; no weight of a matrix product changes.
At 4 bits on the sample the search of one mode took 10 minutes; its winner in `ft2` gets 90.52 % of the report images
right, 1.0 points (0.35 to 1.7) more than the best uniform setting (`docs/accuracy.md`).
"""

SPACE = {
    "mode": ("ft1", "ft2"),
    "calibrator": ("fisher", "mse"),
    "weights": ("fisher",),
    "num_batches": (512,),
    "transforms": (("rotate", "shift", "heads", "balance"), ("rotate",)),
    "corrections": (("split", "fit", "round", "learn"), ("round", "bias", "learn")),
}
