"""What the optional commands share: they read the rows of a task, or the configuration of a run, without a model."""
