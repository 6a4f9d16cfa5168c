"""Find the best calibration setting of a search space: one float pass, then a race of all settings under Ray Tune."""

import sys

from vitq_ray.commands.main import tune_calib as main

if __name__ == "__main__":
    sys.exit(main())
