"""Training that starts from a trained adapter (`model.adapter`). Optional."""
