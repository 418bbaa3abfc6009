"""An optax transformation on stacked, sharded weights that acts as on one entry per layer; private. See `layerwise`."""

__all__: list[str] = []
