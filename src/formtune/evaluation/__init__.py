"""Metrics, intervals, paired tests, slices and reports of a model's answers."""
