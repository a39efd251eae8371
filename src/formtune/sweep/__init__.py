"""One task trained at each point of a grid, and the smallest point that is as good as the best."""
