"""Manifests, and merged and quantized models, kept only if they answer as the adapter does. Optional."""
