"""Scales by gradients, all exact transforms, and corrections: 6 settings of one mode.

python scripts/tune_calib.py --search-space search_spaces/advanced_ptq.py --quant-mode ft2
python scripts/tune_calib.py --search-space search_spaces/advanced_ptq.py --quant-mode ft2 --wprec 4 --aprec 4

Mode and bits are those of the command line. `docs/accuracy.md` says what each part does, costs and brought: `split,
fit, round, learn` serves at 8 bits on a real model, `round, bias` at 4 bits on the bundled sample. Of a real ViT-S/14
in `ft2`, two CPU cores with AMX: 6 min 1 s, `ft2 fisher` with `split, fit, round, learn`; KL 0.0061 on 171 selection
photos and 0.0058 on 170 report photos, two photos below float on the first.
"""

SPACE = {
    "calibrator": ("fisher", "mse"),
    "weights": ("fisher",),
    "num_batches": (16,),
    "transforms": (("rotate", "shift", "heads", "balance"),),
    "corrections": (("split", "fit", "round", "learn"), ("round", "bias"), ()),
}
