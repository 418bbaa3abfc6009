"""Which dims of params are cut over the further axes of a mesh, such as "model" or "expert".

Users say so in two ways. Rules by path, `PipelineModule(..., sharding=[(r"qkv/kernel", P(None, "model"))])`, are searched
for in paths such as "layer_003/attn/qkv/kernel", and the first one that is found there decides. Where none is, the names
that flax has attached to a param decide, one per dim: each stands for the axes that `axis_rules` gives it, or is itself an
axis of the mesh. Both are about the dims that the layer made.

Rules by path are written for a pipeline, so they may only name axes that its mesh has. Annotations come with a layer, and
the layer may be used anywhere: on a mesh with no further axis at all there is nothing that they could say.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxpipe.checks import did_you_mean, show
from jaxpipe.errors import ShardingError
from jaxpipe.mesh import DATA, PIPE, further_axes
from jaxpipe.model.paths import param_path, path_text
from jaxpipe.model.shapes import describe
from jaxpipe.types import Avals

# The names of one dim: none, one, or several.
Names: TypeAlias = tuple[str, ...]

_RESERVED = {
    PIPE: "every rank of a pipeline holds other layers, so no layer is cut over the ranks",
    DATA: "every data rank computes with the same weights, and their gradients are summed over it; to store weights and "
    "optimizer state in parts there, use zero_stage=1",
}


@dataclass(frozen=True)
class Annotation:
    """What flax knows about the dims of a param: names per dim, and rules of its own for what they stand for."""

    names: tuple[Names, ...]
    rules: Mapping[str, Names] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Any, rules: Any = None) -> "Annotation | None":
        """From what flax stores: names, a PartitionSpec, or a sharding that has one; None if it names nothing."""
        spec = getattr(names, "sharding", names)  # of a layout
        spec = getattr(spec, "spec", spec)  # of a NamedSharding
        found = tuple(_as_names(each) or () for each in (() if spec is None else spec))
        return cls(found, _as_rules(rules or ())) if any(found) else None


# Of the params of one layer, by path within the layer: "attn/qkv/kernel".
Annotations: TypeAlias = Mapping[str, Annotation]


@dataclass(frozen=True)
class AxisRules:
    """What a `PipelineModule` says about further axes.

    Attributes:
      paths: patterns of paths, and per dim the axes.
      names: per logical name, the axes that it stands for.
    """

    paths: tuple[tuple[re.Pattern[str], tuple[Names, ...]], ...] = ()
    names: Mapping[str, Names] = field(default_factory=dict)

    @classmethod
    def of(cls, sharding: Any, axis_rules: Any) -> "AxisRules":
        """From the arguments of a `PipelineModule`.

        Raises:
          ShardingError: they are no rules.
        """
        pairs = sharding.items() if isinstance(sharding, Mapping) else () if sharding is None else sharding
        if isinstance(pairs, str) or not isinstance(pairs, Iterable):
            raise ShardingError(
                f"sharding={show(sharding)}: it is a list of pairs of a regular expression and a PartitionSpec, such as "
                '[(r"qkv/kernel", P(None, "model"))].'
            )
        try:
            names = _as_rules(() if axis_rules is None else axis_rules)
        except (TypeError, ValueError):
            raise ShardingError(
                f"axis_rules={show(axis_rules)}: it is a dict from a name of a dim to a mesh axis, a tuple of axes, or "
                'None, such as {"embed": None, "mlp": "model"}.'
            ) from None
        return cls(tuple(_as_path_rule(pair) for pair in pairs), names)

    @property
    def axes(self) -> set[str]:
        """The further axes that the rules name."""
        specs = [*(spec for _, spec in self.paths), self.names.values()]
        return {axis for spec in specs for axes in spec for axis in axes} - _RESERVED.keys()

    def specs(self, mesh: Mesh, layers: Mapping[str, tuple[Avals, Annotations]]) -> dict[str, PartitionSpec]:
        """How params are cut over the further axes.

        Args:
          layers: by the name of the layer in paths ("layer_003"), its params, and what flax says about them.

        Returns:
          By path ("layer_003/attn/qkv/kernel"), a spec of the dims that the layer made, of each param that is cut. Axes of
          one device cut nothing.

        Raises:
          ShardingError: a rule or an annotation does not fit the mesh or the params.
        """
        self._check(mesh)
        unused = dict.fromkeys(pattern.pattern for pattern, _ in self.paths)
        found: dict[str, PartitionSpec] = {}
        for name, (params, annotations) in layers.items():
            for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
                inside, full = path_text(path), param_path(name, path)
                hits = [rule for rule in self.paths if rule[0].search(full)]
                for pattern, _ in hits:
                    unused.pop(pattern.pattern, None)
                if hits:
                    pattern, spec = hits[0]
                    spec = _fitted(mesh, full, leaf, spec, f"the rule {pattern.pattern!r}")
                elif inside in annotations:
                    spec = self._annotated(mesh, full, leaf, annotations[inside])
                else:
                    continue
                if any(spec):
                    found[full] = PartitionSpec(*(axes[0] if len(axes) == 1 else axes or None for axes in spec))
        for pattern in unused:
            raise ShardingError(
                f"sharding: the rule {pattern!r} matches no param. Patterns are searched for in paths such as "
                f"{_some_paths(layers)}."
            )
        return found

    def for_activations(self, mesh: Any, names: Iterable[tuple[str, Any]] | None = None) -> list[tuple[str, Any]]:
        """The rules for logical names in the form that flax takes, with the axes that are left to the compiler only.

        Inside a pipeline a layer has the rows of one data rank, so a name for rows that stands for "data" stands for none.

        Args:
          mesh: whose axes count.
          names: the rules that flax has at present; they hold where the module has none.
        """
        rules = dict(self.names) or _as_rules(names or ())
        further = further_axes(mesh)
        kept = {name: tuple(axis for axis in axes if axis in further) for name, axes in rules.items()}
        return [(name, (axes[0] if len(axes) == 1 else axes) or None) for name, axes in kept.items()]

    def _check(self, mesh: Mesh) -> None:
        for pattern, spec in self.paths:
            _check_spec(mesh, spec, f"sharding: the rule {pattern.pattern!r}")
        if not further_axes(mesh):
            return
        for name, axes in self.names.items():
            for axis in axes:
                if axis not in mesh.shape and axis not in _RESERVED:
                    raise ShardingError(f"axis_rules: {name!r} stands for {axis!r}. {_no_such_axis(mesh, axis)}")

    def _annotated(self, mesh: Mesh, path: str, leaf: jax.ShapeDtypeStruct, annotation: Annotation) -> list[Names]:
        """How a param is cut by the names that flax has for its dims."""
        further = further_axes(mesh)
        spec: list[Names] = []
        for names in annotation.names:
            axes: list[str] = []
            for name in names:
                if name in self.names or name in annotation.rules:
                    axes += self.names.get(name, annotation.rules.get(name, ()))
                elif name in further or name in _RESERVED:
                    axes.append(name)
                elif further:
                    known = [*self.names, *annotation.rules, *mesh.shape]
                    raise ShardingError(
                        f"{path}: its annotation {_shown(annotation.names)} has the name {name!r}, which has no entry in "
                        f"axis_rules and is no axis of the mesh ({_axes(mesh)}).{did_you_mean(name, known)} Say what it "
                        f"stands for: PipelineModule(..., axis_rules={{{name!r}: None}}) cuts that dim over nothing."
                    )
            spec.append(tuple(axes))
        what = f"the annotation {_shown(annotation.names)}"
        if (
            not further
        ):  # what it names is not there; an axis that is there, and is not for params, is a mistake anywhere
            spec = [tuple(axis for axis in axes if axis in _RESERVED) for axes in spec]
        _check_spec(mesh, spec, f"{path}: {what}")
        return _fitted(mesh, path, leaf, spec, what)


def _check_spec(mesh: Mesh, spec: Sequence[Names], what: str) -> None:
    """Raises ShardingError for an axis that is no axis, is not for params, or is there twice."""
    seen: set[str] = set()
    for axis in (axis for axes in spec for axis in axes):
        if axis in _RESERVED:
            raise ShardingError(
                f'{what} cuts params over "{axis}", which is not possible: {_RESERVED[axis]}. Further axes of the mesh are '
                'for that, such as make_mesh(..., model=2). For names of flax, axis_rules={"name": None} cuts nothing.'
            )
        if axis not in mesh.shape:
            raise ShardingError(f"{what} names the axis {axis!r}. {_no_such_axis(mesh, axis)}")
        if axis in seen:
            raise ShardingError(
                f"{what} comes to {_shown(spec)}, which has the axis {axis!r} twice. One axis cuts one dim of an array: "
                "take it away from the other."
            )
        seen.add(axis)


def _fitted(mesh: Mesh, path: str, leaf: jax.ShapeDtypeStruct, spec: Sequence[Names], what: str) -> list[Names]:
    """The spec without axes of one device; raises ShardingError if it does not fit the param."""
    if len(spec) > len(leaf.shape):
        raise ShardingError(
            f"{path} is {describe(leaf)}, and {what} is for {len(spec)} dims: {_shown(spec)}. It may have at most as many "
            "entries as the array has dims, as the layer made it: there is none for ranks and slots of a stack."
        )
    for dim, axes in enumerate(spec):
        pieces = 1
        for axis in axes:
            pieces *= mesh.shape[axis]
        if leaf.shape[dim] % pieces:
            sizes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
            raise ShardingError(
                f"{path} is {describe(leaf)}, and {what} cuts its dim {dim} over {sizes}: {leaf.shape[dim]} is no multiple "
                f"of {pieces}. Change the size of the layer or of the axis, or do not cut that dim."
            )
    return [tuple(axis for axis in axes if mesh.shape[axis] > 1) for axes in spec]


def _as_path_rule(pair: Any) -> tuple[re.Pattern[str], tuple[Names, ...]]:
    example = 'A rule is a pair such as (r"qkv/kernel", P(None, "model")).'
    if not isinstance(pair, Sequence) or isinstance(pair, (str, PartitionSpec)) or len(pair) != 2:
        raise ShardingError(f"sharding: {show(pair)} is no rule. {example}")
    pattern, spec = pair
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ShardingError(f"sharding: {show(pattern)} is no regular expression ({error}). {example}") from None
    if spec is not None and not isinstance(spec, (PartitionSpec, tuple, list)):
        raise ShardingError(f"sharding: the rule {pattern!r} has {show(spec)}, which is no PartitionSpec. {example}")
    try:
        return compiled, tuple(_as_names(each) for each in spec or ())
    except (TypeError, ValueError):
        raise ShardingError(
            f"sharding: the rule {pattern!r} has {show(spec)}. Each entry is a mesh axis, a tuple of axes, or None. "
            + example
        ) from None


def _as_names(entry: Any) -> Names:
    """One entry of a spec; raises TypeError for anything but names."""
    names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(entry)
    return names


def _as_rules(rules: Any) -> dict[str, Names]:
    """A dict, or pairs as flax has them (the first one of a name counts); raises TypeError or ValueError for others."""
    found: dict[str, Names] = {}
    for name, axes in rules.items() if isinstance(rules, Mapping) else rules:
        if not isinstance(name, str):
            raise TypeError(name)
        found.setdefault(name, _as_names(axes))
    return found


def _no_such_axis(mesh: Mesh, axis: str) -> str:
    return (
        f"The mesh has the axes {_axes(mesh)}.{did_you_mean(axis, mesh.shape)} An axis is made by "
        f"make_mesh(..., {axis}=2); of size 1 it is there and cuts nothing."
    )


def _axes(mesh: Mesh) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())


def _shown(spec: Sequence[Names]) -> str:
    return str(PartitionSpec(*(axes if len(axes) > 1 else (axes[0] if axes else None) for axes in spec)))


def _some_paths(layers: Mapping[str, tuple[Avals, Annotations]]) -> str:
    paths = [
        param_path(name, path)
        for name, (params, _) in layers.items()
        for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
    ]
    shown = [repr(path) for path in (paths if len(paths) <= 4 else [*paths[:3], paths[-1]])]
    return ", ".join(shown) or "'layer_000/kernel' (no layer has params)"
