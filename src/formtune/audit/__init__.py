"""What a person should know of a data set before training on it. Needs no model, and no torch."""
