"""Draw what a run found as one page."""

import sys

from vitq_ray.commands.main import report as main

if __name__ == "__main__":
    sys.exit(main())
