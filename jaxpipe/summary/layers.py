"""The table of layers: how much each is, and where its weights live while a step runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxpipe.columns import counted, listed, ranges, short
from jaxpipe.executor.weights import why_everywhere
from jaxpipe.layout.entries import Pile, Shared, Stack
from jaxpipe.layout.layout import Layout
from jaxpipe.layout.on_mesh import in_words
from jaxpipe.mesh import PIPE
from jaxpipe.model.paths import path_text

RULES = "rules or annotations say so"  # why a param is cut over a further axis


@dataclass
class _Row:
    """Like layers in a row, on one stage.

    Attributes:
      home: where their weights are; None if they have none.
    """

    name: str
    stage: int
    home: Stack | Pile | Shared | None
    members: list[int] = field(default_factory=list)


def placed(layout: Layout) -> bool:
    """Whether there is more to say about the rank of a stage than its number."""
    return layout.placement != tuple(range(layout.num_ranks))


def table(layout: Layout, counts: Sequence[int], flops: Sequence[int]) -> list[list[str]]:
    """A row per layer, or per run of like ones on one stage.

    Args:
      counts, flops: parameters, and FLOPs of a forward, of each layer.
    """
    on = ["rank"] if placed(layout) else []
    rows = [["layers", "kind", "stage", *on, "parameters", "FLOPs", "where its weights live", "why"]]
    for row in _rows(layout):
        params, work = (sum(of[index] for index in row.members) for of in (counts, flops))
        where = [str(row.stage), *(str(layout.placement[row.stage]) for _ in on)]
        cells = [ranges(row.members), row.name, *where, f"{params:,}", short(work)]
        for place, why in _places(layout, row):
            rows.append([*cells, place, why])
            cells = [""] * len(cells)
    return rows


def _rows(layout: Layout) -> list[_Row]:
    module, found, last = layout.module, list[_Row](), None
    homes: dict[int, Stack | Pile | Shared] = {shared.layer: shared for shared in layout.shared.values()}
    for several in (*layout.stacks.values(), *layout.piles.values()):
        homes |= dict.fromkeys(several.places, several)
    for index, layer in enumerate(module.layers):
        home, stage = homes.get(module.owners[index]), layout.stage_of(index)
        name = layer.name if module.owners[index] == index else f"{layer.name} (tied)"
        if isinstance(home, Stack | Pile):
            name = home.name
        here: Any = layer.kind, name, stage, id(home)
        if here != last:
            found.append(_Row(name, stage, home))
        found[-1].members.append(index)
        last = here
    return found


def _places(layout: Layout, row: _Row) -> list[tuple[str, str]]:
    """Where the weights of a row live during a step, and why; several pairs if there is more to say."""
    home, ranks = row.home, layout.num_ranks
    if home is None:
        return [("none", "")]
    members = len(home.places) if isinstance(home, Stack | Pile) else 1
    if isinstance(home, Stack):
        places = ranks * home.slots
        empty = f", {places - members} of {places} empty" if places > members else ""
        where = f"stacked, {counted(home.slots, 'slot')} on each rank{empty}"
        return [(where, f"{members} alike, each rank has its own"), *_rules(home)]
    if isinstance(home, Pile):
        first = layout.shared[home.stored_as[row.members[0]]]
        used = sorted({rank for rank, _ in home.places.values()})
        why = f"{members} alike, on {counted(len(used), 'rank')} of {ranks}: a stack would be mostly empty"
        return [("own rank, stacked there", f"{why}; {_stored(first, ranks)}")]
    why = why_everywhere(layout, home)
    if why is None:
        return [("own rank", f"no other rank uses it; {_stored(home, ranks)}")]
    if ranks == 1:
        return [("own rank", why), *_rules(home)]
    return [("everywhere", f"{why}; {_stored(home, ranks)}"), *_rules(home)]


def _rules(home: Stack | Shared) -> list[tuple[str, str]]:
    return [(text, RULES) for text in in_words(home.placements)]


def _stored(home: Shared, ranks: int) -> str:
    """How the arrays of a layer are stored: cut over the ranks, or not."""
    cut: dict[bool, list[str]] = {}
    for path, placement in jax.tree_util.tree_flatten_with_path(home.placements)[0]:
        cut.setdefault(placement.dim(PIPE) is not None, []).append(path_text(path) or "it")
    whole = f"whole on each rank, as no dim is a multiple of {ranks}"
    if len(cut) == 1:
        return "stored cut over the ranks" if True in cut else f"stored {whole}"
    return f"stored cut over the ranks, {listed(cut[False], 4)} {whole}"
