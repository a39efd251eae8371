"""What a person should know of a dataset before training on it. Needs no model, and no torch."""
