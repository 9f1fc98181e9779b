"""Images from a trained model: settings, conditions, samplers' loop, writers."""
