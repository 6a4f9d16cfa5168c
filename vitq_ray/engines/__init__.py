"""Plans executed elsewhere than in PyTorch's eager float arithmetic."""
