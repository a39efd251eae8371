"""Merge and quantize an adapter; keep the result only if it answers as the adapter does."""
