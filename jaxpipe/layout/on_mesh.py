"""Further axes of the mesh and the layout of the params: which cuts are left to the compiler."""

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxpipe.columns import listed
from jaxpipe.errors import LayerError
from jaxpipe.layout.grouping import OwnSpec
from jaxpipe.layout.layout import Layout
from jaxpipe.layout.placement import Placement
from jaxpipe.mesh import DATA, PIPE, further_axes
from jaxpipe.model.module import PipelineModule
from jaxpipe.model.paths import layer_name, param_path, path_text
from jaxpipe.model.precision import NO_CASTS, Precision
from jaxpipe.model.trainable import EVERYTHING, Trainable
from jaxpipe.types import KeyPath, Params, Tree


def layout_on(
    mesh: Mesh,
    module: PipelineModule,
    boundaries: Sequence[int],
    params: Sequence[Params],
    zero_stage: int = 0,
    precision: Precision = NO_CASTS,
    trainable: Trainable = EVERYTHING,
    placement: Sequence[int] | None = None,
) -> Layout:
    """The layout of the params of a module on a mesh, cut over its further axes as rules and annotations say.

    Args:
      params: per layer, its params, or their shapes.
      placement: the rank of each stage; None: stage s is on rank s.

    Raises:
      ShardingError: a rule or an annotation does not fit the mesh or the params.
      LayerError: the params do not fit the module, or it is not known yet what flax says about those of a layer.
      ConfigError: `precision` or `trainable` does not fit the params.
    """
    cuts = own_spec(module, mesh, params)
    return Layout(module, boundaries, params, mesh.shape, zero_stage, cuts, precision, trainable, placement)


def own_spec(module: PipelineModule, mesh: Mesh, params: Sequence[Params]) -> OwnSpec:
    """What `Layout` asks about the further axes."""
    layers = {}
    for index, held in enumerate(params):
        if module.owners[index] != index:
            continue
        annotations = module.layers[index].kind.annotations
        if annotations is None and further_axes(mesh):
            raise LayerError(
                f"{module.label(index)}: a flax.linen module says which axes its params are cut over when it is "
                "initialized, and that has not been tried yet. Call pipe.check(example) before pipe.from_layers."
            )
        layers[layer_name(index)] = held, annotations or {}
    specs = module.axis_rules.specs(mesh, layers)

    def of(layer: int, path: KeyPath, leaf: jax.ShapeDtypeStruct) -> PartitionSpec | None:
        return specs.get(param_path(layer_name(layer), path))

    return of


def left_to_the_compiler(placement: Placement) -> Placement:
    """The cuts over further axes alone."""
    return Placement(tuple(cut for cut in placement.cuts if cut[0] not in (PIPE, DATA)))


def in_words(placements: Tree) -> list[str]:
    """What is cut over which further axis: "over model along dim 1: qkv/kernel, up/kernel", a text per axis and dim.

    Args:
      placements: of the params of a layer.
    """
    found: dict[tuple[str, int], list[str]] = {}
    for path, placement in jax.tree_util.tree_flatten_with_path(placements)[0]:
        for axis, dim in left_to_the_compiler(placement).cuts:
            found.setdefault((axis, dim), []).append(path_text(path) or "it")
    return [f"over {axis} along dim {dim}: {listed(names, 4)}" for (axis, dim), names in sorted(found.items())]


def parts_of(placement: Placement, sizes: Mapping[str, int]) -> int:
    """Into how many parts an array is cut over further axes.

    Args:
      sizes: of the axes of the mesh.
    """
    return math.prod(sizes[axis] for axis, _ in left_to_the_compiler(placement).cuts)
