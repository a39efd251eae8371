"""Constrained decoding: only tokens that can still lead to a valid format. Optional, as its package llguidance."""
