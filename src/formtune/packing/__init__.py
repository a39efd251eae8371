"""Rows that share a prefix share its computation: the fast micro-batches. Optional: without them, rows are padded."""
