"""Training recipes for the best and tied settings of a search: 8 runs of QAT, thinned out by ASHA.

python scripts/tune_calib.py --from-run runs/vit --search-space search_spaces/qat.py --output runs/vit-qat
python scripts/tune_calib.py --search-space search_spaces/qat.py --wprec 4 --aprec 4        # from one setting

On the bundled sample, the second command, three seeds (`--seed S --split-seed S`), on the report images: float 91.42 to
91.50 %, calibrated 84.08 to 84.92 %, trained 89.88 to 90.46 %: 78, 81 and 86 % of the drop won back. ASHA stopped 5 of
the 8 runs each time. About 17 minutes each on two CPU cores that other work shared.
"""

from vitq_ray.search_space import loguniform

# The setting of the command line, or with --from-run the best and tied ones of that run.
SPACE: dict[str, tuple[object, ...]] = {}

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
