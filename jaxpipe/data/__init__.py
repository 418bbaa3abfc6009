"""From the user's iterator to a checked batch on the mesh; private. Read in this order: leaves, check, pull, place."""

__all__: list[str] = []
