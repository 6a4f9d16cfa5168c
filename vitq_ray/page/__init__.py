"""A run as one page: what was tried, what won and how surely, where the loss comes from, and what to do next."""
