"""From a file of rows to a task: what `formtune init` guesses. Does not import torch."""
