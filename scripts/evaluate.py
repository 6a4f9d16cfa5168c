"""Evaluate a float or a calibrated checkpoint on all of val, in map order."""

import sys

from vitq_ray.commands.main import evaluate as main

if __name__ == "__main__":
    sys.exit(main())
