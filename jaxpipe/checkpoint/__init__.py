"""Checkpoints on disk, one item per layer; private.

Read in this order: homes, manifest, directory, items, write, save, read, load; then shares, board, together.
"""

__all__: list[str] = []
