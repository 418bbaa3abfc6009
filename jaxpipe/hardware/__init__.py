"""What the compilers say about hardware that is not there: topologies, compiled steps, and reports about them; private."""

__all__: list[str] = []
