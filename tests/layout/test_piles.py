"""Which like layers are a stack: where that is mostly padding, they are not."""

import pytest

from jaxpipe.layout.piles import SMALL, LikeLayers, piled


@pytest.mark.parametrize(
    ("kinds", "single", "wanted"),
    [
        ([(1, (2, 2, 2, 2))], (4, 0, 0, 4), [False]),  # nothing is padded
        ([(1, (2, 3, 3, 2))], (1, 0, 0, 1), [False]),  # not worth it
        ([(1, (3, 3, 0, 0)), (1, (0, 0, 3, 3))], (0, 0, 0, 0), [True, True]),  # vision, then text
        ([(1, (0, 1, 1, 2, 1, 1, 2, 0))], (2, 0, 0, 0, 0, 0, 0, 2), [True]),  # room beside the embedding
        (
            [(8, (2, 0, 0, 0)), (1, (1, 1, 1, 2))],
            (0, 0, 0, 0),
            [True, True],
        ),  # the others fill what the large ones leave
        ([(8, (2, 0, 0, 0)), (1, (1, 1, 1, 1))], (0, 0, 0, 0), [True, False]),
        ([(1, (4,))], (1,), [False]),
        ([], (1, 2), []),
    ],
    ids=str,
)
def test_choice(kinds, single, wanted):
    found = piled([LikeLayers(SMALL * size, counts) for size, counts in kinds], [SMALL * size for size in single])
    assert found == wanted


def test_small_layers_are_stacks():
    assert piled([LikeLayers(SMALL - 1, (2, 0, 0, 0))], [0, 0, 0, 0]) == [False]
