"""What every package stands on: registries, random numbers, ranks, files, images, the machine."""
