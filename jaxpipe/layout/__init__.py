"""Where the weights lie: the params tree, which device holds which part, and the stages that follow from it; private."""

__all__: list[str] = []
