"""Micro-batches of a small model: a good one, and every kind that is bad by itself."""

import numpy as np

ROWS = 4


def item(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    h, t = rng.normal(size=(2, rows, 3)).astype(np.float32)
    return {"h": h}, {"t": t}


def with_inputs(value):
    return {**item()[0], "more": value}, item()[1]


def with_labels(value):
    return item()[0], {"t": value}


MASKED = np.ma.masked_array(np.ones((ROWS, 3), np.float32), mask=np.eye(ROWS, 3))
# A micro-batch that is bad by itself: (what, the leaf and what is said of it).
BAD = {
    "labels of one row": (
        with_labels(item()[1]["t"][:1]),
        r"labels\['t'\] is float32\[1,3\] and has 1 rows, but inputs\['h'\]",
    ),
    "labels of half the rows": (
        with_labels(item()[1]["t"][:2]),
        r"labels\['t'\] is float32\[2,3\] and has 2 rows, but inputs",
    ),
    "inputs of other rows": (
        with_inputs(np.ones((2, 3))),
        r"inputs\['more'\] is float32\[2,3\] and has 2 rows, but inputs\['h'\]",
    ),
    "no rows": ((item(0)[0], item(0)[1]), r"inputs\['h'\] is float32\[0,3\]: its micro-batches have no rows"),
    "a scalar array": (with_inputs(np.float32(3)), r"inputs\['more'\] is float32\[\], which has no rows"),
    "a number": (with_inputs(3), r"inputs\['more'\] is 3, a single int, not an array.*np\.asarray"),
    "a list of numbers": (
        with_inputs([1, 2, 3, 4]),
        r"inputs\['more'\]\[0\] is 1, a single int, not an array.*np\.asarray",
    ),
    "lists as rows": (
        with_inputs([[1.0, 2.0]] * ROWS),
        r"inputs\['more'\]\[0\]\[0\] is 1\.0, a single float.*np\.asarray",
    ),
    "arrays as rows": (
        with_inputs([np.ones(3)] * ROWS),
        r"inputs\['more'\]\[0\] is float32\[3\] and has 3 rows.*np\.asarray",
    ),
    "a ragged list": (with_inputs([[1, 2], [3]]), r"inputs\['more'\]\[0\]\[0\] is 1, a single int"),
    "a ragged array": (
        with_inputs(np.array([[1, 2], [3]], object)),
        r"inputs\['more'\] is array.* Python objects.*padded",
    ),
    "text": (with_inputs("text"), r"inputs\['more'\] is 'text', a single str"),
    "an array of text": (
        with_inputs(np.array(list("abcd"))),
        r"inputs\['more'\] is an array of text \(<U1\).*tokenizer",
    ),
    "bytes": (with_inputs(np.array([b"a"] * ROWS)), r"inputs\['more'\] is an array of text \(\|S1\)"),
    "dates": (with_inputs(np.zeros(ROWS, "M8[s]")), r"inputs\['more'\] is an array of dtype datetime64\[s\]"),
    "records": (
        with_inputs(np.zeros(ROWS, [("a", "f4")])),
        r"inputs\['more'\] is an array of dtype .*, which JAX does not have",
    ),
    "a mask": (with_labels(MASKED), r"labels\['t'\] is a masked array, whose mask would be lost"),
    "an object": (with_inputs(object()), r"inputs\['more'\] is <object object.*Python objects"),
    "keys of two kinds": (with_inputs({1: np.ones(ROWS), "a": np.ones(ROWS)}), "keys of a dict cannot be sorted"),
    "no inputs": ((None, item()[1]), "inputs of the batch hold no array: None"),
    "a pair of three": ((*item(), 5), r"is a tuple of 3\. It yields pairs \(inputs, labels\)"),
    "a dict": ({"inputs": 1}, "is a dict. It yields pairs"),
}
