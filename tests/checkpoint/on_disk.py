"""What lies in a checkpoint, as any program that knows Orbax finds it."""

import numpy as np

from jaxpipe.checkpoint import items


def arrays_of(folder):
    """{item/name: array} of everything in a checkpoint, as Orbax reads it."""
    found = {}
    for item in sorted(path for path in folder.iterdir() if path.is_dir()):
        for name, array in items.read(item, lambda name: True).items():
            found[f"{item.name}/{name}"] = np.asarray(array)
    return found


def assert_identical(found, wanted, what):
    assert found.keys() == wanted.keys(), f"{what}: {found.keys() ^ wanted.keys()}"
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape, f"{what}: {name}"
        assert found[name].tobytes() == array.tobytes(), f"{what}: {name}"
