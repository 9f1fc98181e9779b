"""To and from other libraries: official checkpoints, adaptation, export, the hub."""
