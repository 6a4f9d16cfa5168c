"""Scales by gradients, exact transforms and corrections, beside plain calibrators: 12 settings of one mode.

python scripts/tune_calib.py --search-space search_spaces/advanced_ptq.py --quant-mode ft2
python scripts/tune_calib.py --search-space search_spaces/advanced_ptq.py --quant-mode ft2 --wprec 4 --aprec 4

Mode and bits are those of the command line. `docs/accuracy.md` says what each part does, costs and brought: `fit,
round` serves at 8 bits on a real model, `round, bias` at 4 bits on the bundled sample.
"""

SPACE = {
    "calibrator": ("fisher", "mse"),
    "weights": ("fisher",),
    "num_batches": (16,),
    "transforms": ((), ("rotate", "shift", "heads", "balance")),
    "corrections": ((), ("fit", "round"), ("round", "bias")),
}
