"""An optax transformation on stacked, sharded weights that acts as on one tree entry per layer; see `layerwise`."""
