"""Checkpoints on disk, one item per layer. Read in this order: layout, manifest, directory, items, save, load."""
