"""Merged and quantized models from an adapter, written only if they still answer as the adapter does."""
