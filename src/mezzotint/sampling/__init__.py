"""Images from a trained model: conditions, settings and protocols, sampling, editing, files."""
