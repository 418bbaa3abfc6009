"""What a step reports by name: the extra losses and metrics of layers, and the metrics of `loss_fn`.

All of them meet in one dict, `Engine.metrics`, beside "loss", "grad_norm" and "loss_scale". So a name means one thing,
which is looked at on shapes, before a step is traced.
"""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from jax.sharding import Mesh

from jaxpipe.errors import LossError
from jaxpipe.model.abstract import abstract
from jaxpipe.model.blame import Fault
from jaxpipe.model.context import Aux
from jaxpipe.model.loss import loss_terms
from jaxpipe.model.metrics import Joined, joinable
from jaxpipe.model.shapes import describe
from jaxpipe.types import Avals, LossFn, Tree

# What the engine reports of every step, by these names.
RESERVED = ("loss", "grad_norm", "loss_scale")


def training_metrics(loss_fn: LossFn | None, outputs: Avals, labels: Avals, mesh: Mesh) -> dict[str, Joined]:
    """The shapes of the metrics of `loss_fn` that a training step reports, for one micro-batch on one data rank.

    Those that keep a value per row are left out: a step reports numbers of the whole batch.

    Raises:
      LossError: one of them has none of the allowed forms, or the name of something else that a step reports.
    """
    if loss_fn is None:
        return {}
    try:
        found: dict[str, Joined] = abstract(
            lambda y, t: joinable(loss_terms(loss_fn, y, t).metrics, 1), outputs, labels, mesh=mesh
        )
    except Fault as fault:
        raise LossError(f"loss_fn {fault}") from fault
    for name in found:
        _check_name(name, "loss_fn returned a metric")
    return found


def with_terms(apply: Callable[..., tuple[Tree, Aux]], rows: int) -> Callable[..., tuple[Tree, Aux]]:
    """The function of a layer, with the terms of its metrics in the place of their values.

    Args:
      rows: the number of rows of a micro-batch on one data rank.
    """

    def call(*args: Any) -> tuple[Tree, Aux]:
        y, aux = apply(*args)
        return y, aux._replace(metrics=joinable(dict(aux.metrics), rows))

    return call


class _HasAux(Protocol):
    @property
    def aux(self) -> Aux: ...


def named_aux(label: Callable[[int], str], layers: Iterable[_HasAux]) -> list[tuple[str, Aux]]:
    """What layers give, with their labels, for `check_names`."""
    return [(label(index), layer.aux) for index, layer in enumerate(layers)]


def check_names(layers: Iterable[tuple[str, Aux]], of_loss_fn: Iterable[str]) -> None:
    """Looks whether each name means one thing.

    Args:
      layers: per layer its label, and the shapes of what it gives.
      of_loss_fn: the names of the metrics of `loss_fn` (or of a function that gives more of them).

    Raises:
      LossError: a name is one of those that the engine reports anyway, or two things of unlike kinds have it.
    """
    kinds: dict[str, tuple[str, str]] = dict.fromkeys(of_loss_fn, ("a metric of loss_fn", "loss_fn"))
    for label, aux in layers:
        for name in aux.losses:
            _check_kind(kinds, name, "an extra loss", label)
        for name, joined in aux.metrics.items():
            shape = describe(joined.terms[0])
            _check_kind(kinds, name, f"a metric by the rule {joined.rule.__name__} of {shape}", label)


def _check_kind(kinds: dict[str, tuple[str, str]], name: str, kind: str, label: str) -> None:
    _check_name(name, f"{label} gives {kind}")
    other, where = kinds.setdefault(name, (kind, label))
    if other != kind:
        raise LossError(
            f"The name {name!r} stands for {other} ({where}) and for {kind} ({label}). One name means one thing: rename "
            "one of the two."
        )


def _check_name(name: str, what: str) -> None:
    if name in RESERVED:
        raise LossError(
            f"{what} of the name {name!r}, but the engine reports the objective, the norm of the gradient and the loss "
            f"scale of every step as {', '.join(map(repr, RESERVED))}. Give it another name."
        )
