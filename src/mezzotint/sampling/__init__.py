"""Sampling from a trained model: conditions, settings, protocols, samplers, writers."""
