"""Tells users which layer an error comes from.

An exception that a layer raises is raised again with the same type, message and traceback, and with a note that has the
index and the name of the layer. There is one exception to that: if the layer does not fit what the layer before it returns,
the message of JAX is about two numbers deep inside JAX. Then a `LayerError` explains it, which is also an instance of the
type that JAX raised.
"""

import contextlib
import dis
import re
import types
from collections.abc import Callable, Iterator

from jaxpipe.errors import JaxpipeError, LayerError

NOTE = "Raised in "

_MARK = "_made_by_a_library"
_LIBRARIES = {"flax", "jax", "jaxlib", "numpy"}
_SHAPES = re.compile(
    r"\b(shapes?|dtypes?|dimensions?|ndim|rank|axis|axes|sizes?|broadcast\w*|incompatible|indexer|dot_general)\b", re.I
)
_CALLS = re.compile(r"\(\) (got|missing|takes)\b")  # what Python says about a wrong call


class Fault(LayerError):
    """Says what a layer does wrong. The message begins with a verb, and `blame` puts the name of the layer before it."""


@contextlib.contextmanager
def blame(label: str, given: Callable[[], str] | None = None) -> Iterator[None]:
    """Adds the name of the layer to an exception that is raised inside of the `with` block.

    Args:
      label: the name, such as `layer 2 (Block)`.
      given: says what the layer was given and by whom, such as `layer 1 (Scale) returns float32[4,8]`; None while the layer
        is built.

    Raises:
      LayerError: the layer does something that is not allowed, or does not fit what it was given.
    """
    try:
        yield
    except Fault as fault:
        raise LayerError(f"{label} {fault}") from fault.__cause__
    except JaxpipeError:
        raise
    except Exception as error:
        if any(note.startswith(NOTE) for note in getattr(error, "__notes__", ())):
            raise
        if given is not None and _is_misfit(error):
            raise _as_layer_error(
                error,
                f"{label} cannot take its input: {given()}. It failed with {type(error).__name__}: "
                f"{str(error).strip().rstrip('.')}. Make the two fit, or put a layer between them.",
            ) from error
        with contextlib.suppress(Exception):  # an exception class may forbid new attributes
            error.add_note(f"{NOTE}{label}, {'while it was built' if given is None else given()}.")
            if isinstance(error, NameError) and "unbound axis name" in str(error):
                error.add_note(
                    'Only "data" is bound in a layer. Further axes of the mesh are left to the compiler: put what names '
                    "them into jaxpipe.parallel.shard_map."
                )
        raise


def mark(error: Exception) -> None:
    """Stores, in an error that leaves a layer, whether JAX (or flax, or NumPy) made it.

    JAX removes its own frames from a traceback and says so in a note. Functions of JAX around the layer do that too, so
    this must be called before the error gets there.
    """
    notes = getattr(error, "__notes__", ())
    by_library = _package_of(error) in _LIBRARIES or any("JAX has removed" in note for note in notes)
    with contextlib.suppress(Exception):  # an exception class may forbid new attributes
        error.__dict__.setdefault(_MARK, by_library)


def _is_misfit(error: Exception) -> bool:
    """Whether JAX (or flax, or NumPy) could not compute with the shapes or dtypes that the layer was given."""
    if type(error) not in (TypeError, ValueError) and type(error).__name__ != "ScopeParamShapeError":
        return False
    text = str(error)
    fits = _SHAPES.search(text) and not _CALLS.search(text) and error.__dict__.get(_MARK, False)
    return bool(fits) and not _raised_by_hand(error)


def _last(error: Exception) -> types.TracebackType | None:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _package_of(error: Exception) -> str:
    trace = _last(error)
    return "" if trace is None else trace.tb_frame.f_globals.get("__name__", "").partition(".")[0]


def _raised_by_hand(error: Exception) -> bool:
    """Whether a `raise` statement outside of these libraries raised the error.

    If the frames of JAX were removed, the last frame belongs to the user even for an error of JAX. Then the instruction at
    which that frame stopped is a call or an operator, and not a `raise`.
    """
    trace = _last(error)
    if trace is None or _package_of(error) in _LIBRARIES:
        return False
    return dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")


def _as_layer_error(error: Exception, text: str) -> LayerError:
    kind = type(error)
    if isinstance(LayerError(), kind):
        return LayerError(text)
    both = type(LayerError.__name__, (LayerError, kind), {"__module__": LayerError.__module__, "__str__": _text})
    made = both.__new__(both, text)  # without __init__, because that of `kind` may need other arguments
    made.args = (text,)
    return made


def _text(error: BaseException) -> str:
    return str(error.args[0])
