"""`python -m vitq_ray`: the console command."""

import sys

from vitq_ray.commands.main import main

if __name__ == "__main__":
    sys.exit(main(program="python -m vitq_ray"))
