"""The base model folder: checks, fingerprint, and the renderer of conversations to token ids."""
