"""Checkpoints on disk, one item per layer. Read in this order: homes, manifest, directory, items, save, load."""
