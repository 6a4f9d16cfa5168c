"""What to try and who wins, without Ray."""
