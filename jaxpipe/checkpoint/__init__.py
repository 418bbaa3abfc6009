"""Checkpoints on disk, one item per layer; private. Read in this order: homes, manifest, directory, items, save, load."""

__all__: list[str] = []
