"""Trains a task at each point of a grid, and chooses the smallest point near the best."""
