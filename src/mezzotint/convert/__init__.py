"""Checkpoint conversion, fine-tuning, export and model cards."""
