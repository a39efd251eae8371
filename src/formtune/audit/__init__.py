"""What to know about a dataset before training on it. Needs neither a model nor torch."""
