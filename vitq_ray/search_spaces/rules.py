"""Rules for single sites, as an example of how to write them: 18 settings.

python scripts/tune_calib.py --search-space search_spaces/rules.py
python scripts/tune_calib.py --search-space search_spaces/rules.py --wprec 4 --aprec 4

Not measured. A key with a dot or a star is a site pattern: its values are what those sites do instead, None is what the
others do. `rules` has whole lists of rules, tried one list at a time; patterns may name a block.
"""

SPACE = {
    "mode": ("ft2",),
    "calibrator": ("percentile",),
    "percentile": (99.9, 99.99),
    "num_batches": (8,),
    "*.ffn.fc2._input_quantizer": (None, "mse", "x 0.9"),  # output of GELU
    "rules": (
        (),
        ("*.attn.softmax_input_quantizer -> off",),
        ("0.* -> 8 bits", "*.attn.matmul_a_input_quantizer -> max"),  # attention probabilities
    ),
}
