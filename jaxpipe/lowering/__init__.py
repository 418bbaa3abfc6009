"""Schedule -> Program, without JAX; private. Read in this order: channels, period, program, overlap, sketch,
pace, timing, slots, rows, lower, verify."""

__all__: list[str] = []
