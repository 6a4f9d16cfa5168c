"""What serves best without training, on models with outliers and without: scales by gradients and by least squares,
exact transforms of the weights, in both of FasterTransformer's plain modes. 24 settings; the default.

python scripts/tune_calib.py
python scripts/tune_calib.py --wprec 4 --aprec 4

Bits are those of the command line. Needs 128 calibration images. `docs/accuracy.md` says what each part does. On the
bundled sample, two CPU cores: 8 bits 84 s, `ft1 mse, weights mse` with all transforms, 91.56 % on the report images
(float 91.50 %), KL to float 0.00019; 4 bits 78 s, `ft1 fisher, weights mse` with all transforms, 90.38 %, KL 0.031
(`calib`: 89.96 %, 0.035). On a real ViT-S/14, 8 bits, with 256 calibration photos: `ft2 fisher, weights mse` with all
transforms, KL 0.0104 on report, where plain calibrators had 0.035 and more.
"""

SPACE = {
    "mode": ("ft1", "ft2"),
    "calibrator": ("fisher", "mse"),
    "weights": ("fisher", "mse"),
    "num_batches": (16,),
    "transforms": ((), ("rotate",), ("rotate", "shift", "heads", "balance")),
}
