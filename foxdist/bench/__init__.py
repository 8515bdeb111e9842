"""Measurements behind a correctness gate: python -m foxdist.bench attention."""
