"""What serves best without training, on models with outliers and without: scales by gradients and by least squares,
exact transforms of the weights, corrections, in both of FasterTransformer's plain modes. 24 settings; the default.

python scripts/tune_calib.py
python scripts/tune_calib.py --wprec 4 --aprec 4

Bits are those of the command line. Needs 128 calibration images. `docs/accuracy.md` says what each part does. Two CPU
cores with AMX: the bundled sample at 8 bits in 86 s, `ft1 fisher` with all transforms and `split, fit, round`, 91.50 %
on the report images (float 91.50 %), KL to float 0.00015; at 4 bits in 93 s, `ft1 mse` with `rotate` and `split, fit,
round`, 90.42 %, KL 0.027 (`calib`: 89.96 %, 0.035). A real ViT-S/14 in 9 minutes, `ft1 fisher` with `split, fit,
round`, KL 0.0054 on 170 report photos. `advanced_ptq`, of one mode and with `learn`, takes six.
"""

SPACE = {
    "mode": ("ft1", "ft2"),
    "calibrator": ("fisher", "mse"),
    "weights": ("fisher",),
    "num_batches": (16,),
    "transforms": (("rotate", "shift", "heads", "balance"), ("rotate",)),
    "corrections": (("split", "fit", "round"), ("round", "bias"), ()),
}
