"""Schedule -> Program. Read in this order: routes, slots, period, program, lower, verify. No JAX, no stability promised."""
