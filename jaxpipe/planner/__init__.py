"""Which mesh, schedule and settings train a model fastest on given chips: costs, memory, and a search; private."""

__all__: list[str] = []
