"""Train a calibrated model with its quantizers on, taught by the float model; keep the best epoch."""

import sys

from vitq_ray.commands.main import qat as main

if __name__ == "__main__":
    sys.exit(main())
