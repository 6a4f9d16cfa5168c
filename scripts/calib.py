"""Calibrate one INT8 setting, evaluate it on all of val, and write the calibrated checkpoint."""

import sys

from vitq_ray.commands.main import calib as main

if __name__ == "__main__":
    sys.exit(main())
