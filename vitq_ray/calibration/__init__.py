"""From tensors to plans: histograms, the table of calibrators, statistics, settings, scales."""
