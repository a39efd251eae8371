"""The training pipeline, and the callbacks and files around a run."""
