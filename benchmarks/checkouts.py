"""Compares the compiled programs of this checkout with those of another one: did a change leave them alone?

    git worktree add /tmp/before main
    python benchmarks/checkouts.py /tmp/before

Both versions of jaxpipe are imported into this one process. For each case (a model, a cut, a schedule, options) it says
whether the lowered text is the same, byte for byte. Where it is not, both are compiled and run: bytes of temporary memory,
permutes and lines of optimized HLO of both, and whether the results are equal, bit for bit. `--times` also runs a training
step of both in turns and gives the ratio. Writes results/<platform>_<date>.json with `--output`.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=600 " + os.environ.get("XLA_FLAGS", "")

import jax
import measure
import numpy as np

ROOT = Path(__file__).parents[1]
DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable


class Version:
    """One checkout of jaxpipe and the models, imported under their usual names while `active`."""

    def __init__(self, root: Path):
        self.root = root
        self.modules: dict[str, ModuleType] = {}
        self.jaxpipe = self._import("jaxpipe", root / "jaxpipe" / "__init__.py", package=True)
        # The models are those of this checkout for both: only the library may differ.
        self.models = self._import("models", ROOT / "tests" / "models.py")
        self.transformer = self._import("model", ROOT / "benchmarks" / "model.py")

    def _import(self, name: str, path: Path, package: bool = False) -> ModuleType:
        with self:
            where = [str(path.parent)] if package else None
            spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=where)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            return module

    def __enter__(self) -> "Version":
        sys.modules.update(self.modules)
        return self

    def __exit__(self, *_: object) -> None:
        """Takes the modules of this version away again, for the other one's turn."""
        names = [name for name in sys.modules if name.split(".")[0] in ("jaxpipe", "models", "model")]
        self.modules |= {name: sys.modules.pop(name) for name in names}


# name -> (model, pipe, data, M, schedule, remat, with a key)
TRAIN: dict[str, tuple[str, int, int, int, str, Any, bool]] = {
    "tied S1 M4 layer key": ("tied", 1, 1, 4, "1f1b", "layer", True),
    "tied S2 M4 layer key": ("tied", 2, 1, 4, "1f1b", "layer", True),
    "tied S3 M2 none key": ("tied", 3, 1, 2, "1f1b", "none", True),
    "tied S4 M6 2": ("tied", 4, 1, 6, "1f1b", 2, False),
    "tied S4 D2 M8 layer key": ("tied", 4, 2, 8, "1f1b", "layer", True),
    "tied S2 D2 M4 stage gpipe": ("tied", 2, 2, 4, "gpipe", "stage", False),
    "tied S4 M8 layer eager": ("tied", 4, 1, 8, "eager_1f1b", "layer", False),
    "untied S1 M1 none": ("untied", 1, 1, 1, "1f1b", "none", False),
    "untied S2 M3 dots key": ("untied", 2, 1, 3, "1f1b", DOTS, True),
    "untied S3 D2 M5 layer key": ("untied", 3, 2, 5, "1f1b", "layer", True),
    "untied S4 M4 none eager key": ("untied", 4, 1, 4, "eager_1f1b", "none", True),
    "untied S8 M8 gpipe": ("untied", 8, 1, 8, "gpipe", "layer", False),
    "mixed S1 D2 M2 layer key": ("mixed", 1, 2, 2, "1f1b", "layer", True),
    "mixed S2 M4 none": ("mixed", 2, 1, 4, "1f1b", "none", False),
    "mixed S3 M3 stage key": ("mixed", 3, 1, 3, "1f1b", "stage", True),
    "mixed S4 D2 M6 dots": ("mixed", 4, 2, 6, "1f1b", DOTS, False),
    "mixed S4 M2 3 eager": ("mixed", 4, 1, 2, "eager_1f1b", 3, False),
}
# name -> (model, pipe, data, M, options)
EVAL: dict[str, tuple[str, int, int, int, dict[str, Any]]] = {
    "eval tied S1 M4": ("tied", 1, 1, 4, {}),
    "eval tied S4 D2 M6": ("tied", 4, 2, 6, {}),
    "eval tied S4 M8 spread": ("tied", 4, 1, 8, {"spread_loss": True}),
    "eval untied S2 M3 sum logits": ("untied", 2, 1, 3, {"reduce_output": "sum", "return_logits": True}),
    "eval untied S3 D2 M5 each": ("untied", 3, 2, 5, {"reduce_output": None}),
    "eval untied S4 M4 last rank": ("untied", 4, 1, 4, {"bcast_loss": False}),
    "eval mixed S2 D2 M2 metrics": ("mixed", 2, 2, 2, {"return_metrics": True}),
    "eval mixed S4 M5 outputs": ("mixed", 4, 1, 5, {"compute_loss": False}),
    "eval mixed S3 M7 spread": ("mixed", 3, 1, 7, {"spread_loss": True}),
}


def build(version: Version, name: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(lower the program of a case, run it)."""
    models, jaxpipe = version.models, version.jaxpipe
    if name in TRAIN:
        model, stages, data, count, schedule, remat, with_key = TRAIN[name]
        options: dict[str, Any] = {}
    else:
        (model, stages, data, count, options), schedule, remat, with_key = EVAL[name], "1f1b", "layer", False
    module = models.MODELS[model]()
    pipe = jaxpipe.Pipeline(module, jaxpipe.make_mesh(pipe=stages, data=data), count, schedule, remat)
    batch = models.make_batch(count)
    params = pipe.init(jax.random.key(1), batch[0][0])
    if name in TRAIN:
        key = jax.random.key(2) if with_key else None
        return lambda: pipe.lower_train(params, batch, key), lambda: pipe.value_and_grad(params, batch, key)
    return lambda: pipe.lower_eval(params, batch, **options), lambda: pipe.evaluate(params, batch, **options)


def look(version: Version, name: str, run: bool) -> dict[str, Any]:
    """The program of a case and, with `run`, what comes of compiling and running it."""
    with version:
        lower, call = build(version, name)
        lowered = lower()
        text = lowered.as_text()
        found: dict[str, Any] = {
            "sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
            "stablehlo": len(text.splitlines()),
        }
        if run:
            compiled = lowered.compile()
            lines = [line for line in compiled.as_text().splitlines() if line.startswith("  ")]
            found["temp_bytes"] = compiled.memory_analysis().temp_size_in_bytes
            found["permutes"] = sum(
                " collective-permute(" in line or " collective-permute-start(" in line for line in lines
            )
            found["hlo_lines"] = len(lines)
            found["result"] = _hash(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(call())))
        return found


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def step_of(version: Version, stages: int, remat: Any) -> Callable[[], Any]:
    """A training step of the benchmark's transformer."""
    with version:
        model, jaxpipe = version.transformer, version.jaxpipe
        size = model.Size()
        pipe = jaxpipe.Pipeline(model.make_module(size), jaxpipe.make_mesh(pipe=stages), 8, "1f1b", remat)
        params = pipe.from_layers(model.make_layers(size))
        batch = jax.device_put(model.make_batch(size, 8))

        def step() -> Any:
            with version:
                return pipe.value_and_grad(params, batch)

        jax.block_until_ready(step())
        return step


def main() -> None:
    """Prints a line per case and, with --times, the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--times", type=int, default=0, metavar="ROUNDS", help="rounds of timing (default: none)")
    parser.add_argument("--run", action="store_true", help="compile and run every case, equal text or not")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    versions = Version(arguments.before.resolve()), Version(ROOT)
    figures: dict[str, Any] = {"cases": {}, "times": {}}
    for name in [name for name in (*TRAIN, *EVAL) if arguments.only in name]:
        before, after = (look(version, name, arguments.run) for version in versions)
        same = before["sha256"] == after["sha256"]
        if not same and not arguments.run:
            before, after = (look(version, name, True) for version in versions)
        figures["cases"][name] = {"same": same, "before": before, "after": after}
        words = "same" if same else "OTHER"
        for key in before.keys() - {"sha256"} if not same else ():
            words += f"  {key} {before[key]} -> {after[key]}" if before[key] != after[key] else f"  {key} ="
        print(f"{name:32} {before['sha256']} {after['sha256']} {words}", flush=True)
    if arguments.times:
        for stages, remat in ((1, "layer"), (2, "layer"), (4, "layer"), (4, "none")):
            steps = [step_of(version, stages, remat) for version in versions]
            before, after = measure.interleave(steps, arguments.times)
            found = measure.ratio(after, before)
            figures["times"][f"S={stages} {remat}"] = found
            spread = f"{found['median']:.3f} ({found['min']:.3f}-{found['max']:.3f})"
            print(f"step S={stages} remat={remat}: after / before {spread}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
