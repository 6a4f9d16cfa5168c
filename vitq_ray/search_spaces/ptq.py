"""What serves best without training, on models with outliers and without: scales by gradients and by least squares,
exact transforms of the weights, corrections, in both of FasterTransformer's plain modes. 24 settings; the default.

python scripts/tune_calib.py
python scripts/tune_calib.py --wprec 4 --aprec 4

Bits are those of the command line. Needs 128 calibration images. `docs/accuracy.md` says what each part does. On the
bundled sample, two CPU cores: 8 bits 132 s, `ft1 mse` with `rotate` and `fit, round`, 91.50 % on the report images
(float 91.50 %), KL to float 0.00018; 4 bits 131 s, `ft1 mse` with all transforms and `round, bias`, 90.04 %, KL 0.023
(`calib`: 89.96 %, 0.035). A real ViT-S/14 takes about 25 minutes, most of it plans with corrections, by its own
countdown; not run to its end. `advanced_ptq`, a quarter of this space with all transforms, takes seven.
"""

SPACE = {
    "mode": ("ft1", "ft2"),
    "calibrator": ("fisher", "mse"),
    "weights": ("fisher",),
    "num_batches": (16,),
    "transforms": (("rotate", "shift", "heads", "balance"), ("rotate",)),
    "corrections": (("split", "fit", "round"), ("round", "bias"), ()),
}
