"""Schedule -> Program, without JAX; private. Read in this order: channels, slots, period, program, rows, lower, verify."""

__all__: list[str] = []
