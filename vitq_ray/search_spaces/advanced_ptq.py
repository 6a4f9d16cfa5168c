"""Scales by gradients, all exact transforms, and corrections: 6 settings of one mode.

python scripts/tune_calib.py --search-space search_spaces/advanced_ptq.py --quant-mode ft2
python scripts/tune_calib.py --search-space search_spaces/advanced_ptq.py --quant-mode ft2 --wprec 4 --aprec 4

Mode and bits are those of the command line. `docs/accuracy.md` says what each part does, costs and brought: `split,
fit, round, learn` serves at 8 bits on a real model, `round, bias` at 4 bits on the bundled sample. Of a real ViT-S/14
in `ft2`, two CPU cores with AMX: 5 min 32 s, `ft2 fisher` with `split, fit, round, learn`; KL 0.0068 on 171 selection
photos and 0.0062 on 170 report photos, three photos of the 341 below float.
"""

SPACE = {
    "calibrator": ("fisher", "mse"),
    "weights": ("fisher",),
    "num_batches": (16,),
    "transforms": (("rotate", "shift", "heads", "balance"),),
    "corrections": (("split", "fit", "round", "learn"), ("round", "bias"), ()),
}
