"""Metrics, outcomes, intervals and baselines of a model's answers."""
