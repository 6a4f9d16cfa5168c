"""Evaluate a float or a calibrated checkpoint on all of val, in map order."""

import sys

from vitq_ray.commands.evaluate import main
from vitq_ray.commands.options import run

if __name__ == "__main__":
    sys.exit(run(main))
