"""Say what each site, family and block of a plan costs."""

import sys

from vitq_ray.commands.main import sensitivity as main

if __name__ == "__main__":
    sys.exit(main())
