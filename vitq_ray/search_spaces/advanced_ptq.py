"""Scales by gradients, exact transforms and corrections, beside plain calibrators: 12 settings of one mode.

python scripts/tune_calib.py --search-space search_spaces/advanced_ptq.py --quant-mode ft2
python scripts/tune_calib.py --search-space search_spaces/advanced_ptq.py --quant-mode ft2 --wprec 4 --aprec 4

Mode and bits are those of the command line. `docs/accuracy.md` says what each part does, costs and brought. An earlier
form of this space (36 settings), by top-1, on the bundled sample at 4 bits: 89.72 % on report in 4 minutes; the best
setting without these parts had 88.92 % on selection, the winner 89.64 %. Not run to its end on a real model: plan 10
minutes and more for a ViT-S at two CPUs, most of it corrections.
"""

_ALL = ("rotate", "shift", "heads", "balance")

SPACE = {
    "calibrator": ("fisher", "mse"),
    "weights": ("fisher",),
    "num_batches": (16,),
    "transforms": ((), ("rotate",), _ALL),
    "corrections": ((), ("round", "bias")),
}
