"""A run as one page: what was tried, what won and how surely, where the loss comes from, and what to do next."""

import logging

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of a home that cannot keep its cache
