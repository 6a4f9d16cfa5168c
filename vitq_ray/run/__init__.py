"""The folder of a run and what its files say."""
