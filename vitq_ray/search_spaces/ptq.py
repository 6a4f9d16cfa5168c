"""What serves best without training, on models with outliers and without: scales by gradients and by least squares,
exact transforms of the weights, corrections, in both of FasterTransformer's plain modes. 24 settings; the default.

python scripts/tune_calib.py
python scripts/tune_calib.py --wprec 4 --aprec 4

Bits are those of the command line. Needs 128 calibration images. `docs/accuracy.md` says what each part does.
"""

SPACE = {
    "mode": ("ft1", "ft2"),
    "calibrator": ("fisher", "mse"),
    "weights": ("fisher",),
    "num_batches": (16,),
    "transforms": (("rotate", "shift", "heads", "balance"), ("rotate",)),
    "corrections": (("fit", "round"), ("round", "bias"), ()),
}
