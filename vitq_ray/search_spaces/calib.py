"""Which calibrator, how much of it, from how many images, in which of FasterTransformer's modes: 48 settings.

python scripts/tune_calib.py --search-space search_spaces/calib.py
python scripts/tune_calib.py --search-space search_spaces/calib.py --wprec 4 --aprec 4

On the bundled sample, two CPU cores: 8 bits 77 s, 41 settings tied with the winner, `ft1 percentile 99.9 n=8`, 91.24 %
on the report images (float 91.50 %); 4 bits 39 s, winner `ft1 mse n=2`, 90.04 %.
"""

from vitq_ray.search_space import percentiles

SPACE = {
    "mode": ("ft1", "ft2"),
    "calibrator": ("max", "mse", "entropy", "percentile"),
    "percentile": percentiles(99, 99.9999, 5),
    "num_batches": (2, 8, 32),
}
