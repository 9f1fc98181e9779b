"""Faster replacements for slow PyTorch operations, equal up to rounding."""
