"""Training recipes for the best and tied settings of a search: 8 runs of QAT, thinned out by ASHA.

python scripts/tune_calib.py --from-run runs/vit --search-space search_spaces/qat.py --output runs/vit-qat
python scripts/tune_calib.py --search-space search_spaces/qat.py --wprec 4 --aprec 4        # from one setting
"""

from vitq_ray.search_space import loguniform

SPACE: dict = {}  # the setting of the command line, or with --from-run the best and tied ones of that run

QAT = {
    "lr": loguniform(1e-4, 3e-3),
    "global_batch": (32, 64, 128),
    "distill_scale": loguniform(10, 1000),
    "temperature": (1.0, 3.0, 6.0),
    "learn_amax": (False, True),
    "augment": ("none",),
    "dropout": (0.0,),
    "optimizer": ("adamw",),
    "schedule": ("cosine",),
    "num_samples": 8,
    "epochs": 8,
}
