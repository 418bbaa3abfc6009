"""Which mesh, schedule and settings train a model fastest on chips that may not be there: costs, memory, search; private."""

__all__: list[str] = []
