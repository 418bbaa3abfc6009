"""What layers and params are called where they are listed by name: in rules, in checkpoints, in optimizers."""

import jax

from jaxpipe.types import KeyPath


def layer_name(layer: int) -> str:
    """The name of a layer, such as `layer_003`."""
    return f"layer_{layer:03d}"


def path_text(path: KeyPath) -> str:
    """The path of a param within its layer, such as `attn/qkv/kernel`; empty if the layer's params are one array."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def param_path(layer: str, path: KeyPath) -> str:
    """The path of a param, such as `layer_003/attn/qkv/kernel`, from the name of its layer and the way to it."""
    return "/".join(filter(None, [layer, path_text(path)]))
