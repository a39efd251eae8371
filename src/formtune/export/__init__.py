"""Merge and quantize an adapter; write the result only if it still answers as the adapter does."""
