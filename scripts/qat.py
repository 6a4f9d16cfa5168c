"""Train a calibrated model with its quantizers on, taught by the float model; keep the best epoch."""

import sys

from vitq_ray.commands.options import run
from vitq_ray.commands.train import main

if __name__ == "__main__":
    sys.exit(run(main))
