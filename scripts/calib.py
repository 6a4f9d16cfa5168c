"""Calibrate one INT8 setting, evaluate it on all of val, and write the calibrated checkpoint."""

import sys

from vitq_ray.commands.calibrate import main
from vitq_ray.commands.options import run

if __name__ == "__main__":
    sys.exit(run(main))
