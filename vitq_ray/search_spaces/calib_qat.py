"""Calibration first, training where it is needed: race 32 settings, escalate to QAT if the best misses the target.

python scripts/tune_calib.py --search-space search_spaces/calib_qat.py
python scripts/tune_calib.py --search-space search_spaces/calib_qat.py --wprec 4 --aprec 4 --target-drop 0.5

On the bundled sample at 4 bits, two CPU cores, the race took 29 s. With an earlier QAT (SGD) the training runs took
another 445 s; this one (AdamW) was not measured in this space, but in `qat.py`'s.
"""

from vitq_ray.search_space import loguniform, percentiles

SPACE = {
    "mode": ("ft1", "ft2"),
    "calibrator": ("max", "mse", "entropy", "percentile"),
    "percentile": percentiles(99, 99.9999, 5),
    "num_batches": (2, 32),
}

QAT = {
    "lr": loguniform(1e-4, 3e-3),
    "global_batch": (32, 64),
    "distill_scale": loguniform(10, 1000),
    "temperature": (1.0, 3.0),
    "learn_amax": (False, True),
    "augment": ("none",),
    "dropout": (0.0,),
    "optimizer": ("adamw",),
    "schedule": ("cosine",),
    "num_samples": 6,
    "epochs": 6,
}
