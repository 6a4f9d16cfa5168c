"""Scales by gradients, exact transforms and corrections, beside plain calibrators: 12 settings of one mode.

python scripts/tune_calib.py --search-space search_spaces/advanced_ptq.py --quant-mode ft2
python scripts/tune_calib.py --search-space search_spaces/advanced_ptq.py --quant-mode ft2 --wprec 4 --aprec 4

Mode and bits are those of the command line. `docs/accuracy.md` says what each part does, what it costs and what it
brought.
"""

_ALL = ("rotate", "shift", "heads", "balance")

SPACE = {
    "calibrator": ("fisher", "mse"),
    "weights": ("fisher",),
    "num_batches": (16,),
    "transforms": ((), ("rotate",), _ALL),
    "corrections": ((), ("round", "bias")),
}
