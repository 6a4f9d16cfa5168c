"""What serves best without training, on models with outliers and without: scales by gradients and by least squares,
exact transforms of the weights, in both of FasterTransformer's plain modes. 24 settings; the default.

python scripts/tune_calib.py
python scripts/tune_calib.py --wprec 4 --aprec 4

Bits are those of the command line. Needs 128 calibration images. `docs/accuracy.md` says what each part does. On the
bundled sample, two CPU cores with other work on them, with 256: 8 bits 115 s, `ft1 mse, weights mse, rotate`, 91.52 %
on the report images (float 91.50 %), KL to float 0.00019; 4 bits 90 s, the same setting, 90.24 %, KL 0.030 (`calib`:
89.96 %, 0.035).
"""

SPACE = {
    "mode": ("ft1", "ft2"),
    "calibrator": ("fisher", "mse"),
    "weights": ("fisher", "mse"),
    "num_batches": (16,),
    "transforms": ((), ("rotate",), ("rotate", "shift", "heads", "balance")),
}
