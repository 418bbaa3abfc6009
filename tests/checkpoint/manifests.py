"""A manifest, and a checkpoint of one file that has it; no arrays."""

from jaxpipe.checkpoint import directory as folders
from jaxpipe.checkpoint.manifest import (
    ArraySpec,
    LayerRecord,
    Manifest,
)

ARRAYS = {
    "params/w": ArraySpec("float32", (2, 3)),
    "params/n": ArraySpec("int32", ()),
    "opt_state/0:mu/w": ArraySpec("bfloat16", (2, 3)),
}
MADE = Manifest(
    id="abc",
    layers=[LayerRecord("Embed", None, ARRAYS), LayerRecord("Head", 0, {})],
    state={"step": ArraySpec("int32", ())},
    step=3,
    train_calls=4,
    micro_batches_seen=12,
    data_state={"json": [1, None]},
    key_impl="fry",
    client_state={"epoch": 1},
    config={"remat": "layer"},
    partition=[0, 1, 2],
    mesh={"pipe": 2},
    versions={"jaxpipe": "0.1.0"},
    saved_at="2026-01-01T00:00:00.000000+00:00",
    files={"layer_000/d/x": 10},
)


def save(directory, tag, step=1, content="x"):
    """A checkpoint of one file."""
    with (draft := folders.Draft(directory, tag)) as path:
        (path / "file").write_text(content)
        made = {**vars(MADE), "step": step, "saved_at": f"2026-01-01T00:00:{step:02d}.000000+00:00"}
        (path / "checkpoint.json").write_text(type(MADE)(**made).to_json())
        return draft.commit()
