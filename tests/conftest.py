"""Simulated devices and strict modes for the whole suite."""

import contextlib
import importlib.metadata
import logging
import os
import shutil
import tempfile

# Before jax is imported: with many devices on few cores a tick may be slow, and XLA would abort the process.
_FLAGS = [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300",
    # Compile time is the budget of this suite. (One piece of code per program: no threads are left for more of them.)
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")  # the same; later versions do not know it, and would abort
os.environ["XLA_FLAGS"] = " ".join(_FLAGS)

import hypothesis
import jax
import pytest

jax.config.update("jax_num_cpu_devices", 16)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Many tests make the same program once more: an oracle, the first weights of a small model. Each pytest process has a
# folder of its own: JAX writes such files without a lock, and a process that is killed would leave a half of one.
_programs = tempfile.mkdtemp(prefix="jaxpipe-tests-")
jax.config.update("jax_compilation_cache_dir", _programs)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

hypothesis.settings.register_profile("jaxpipe", deadline=None)  # a first call may trace
hypothesis.settings.load_profile("jaxpipe")


def pytest_unconfigure():
    shutil.rmtree(_programs, ignore_errors=True)


@pytest.fixture
def no_compiles():
    """`with no_compiles():` fails if anything inside it compiles."""

    @contextlib.contextmanager
    def guard():
        seen: list[str] = []
        handler, logger = logging.Handler(), logging.getLogger("jax")
        handler.emit = lambda record: seen.append(record.getMessage())
        logger.addHandler(handler)
        propagate, logger.propagate = logger.propagate, False
        try:
            with jax.log_compiles():
                yield
        finally:
            logger.removeHandler(handler)
            logger.propagate = propagate
        compiled = [line for line in seen if line.startswith("Finished XLA compilation")]
        assert not compiled, "\n".join(compiled)

    return guard
