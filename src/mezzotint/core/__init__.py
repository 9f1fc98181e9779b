"""Shared utilities: registries, random numbers, processes, files, images, progress."""
