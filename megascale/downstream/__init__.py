"""Splits, scores and tables."""
