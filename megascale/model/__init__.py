"""The multi-scale Transformer."""
