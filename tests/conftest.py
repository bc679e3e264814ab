"""How JAX runs in the tests; set before it starts, and inherited by the programs and workers that the tests start."""

import atexit
import ctypes
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Where workers share the cores, threads of PyTorch and NumPy would wait, and spin, for others that do not run.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Eight devices on every machine, so that what is sharded is really sharded.
# XLA ends a process one of whose devices has kept the others waiting for 40 s, as happens where cores are few and busy.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=900"
)
# Compiling takes most of the time, and what is compiled runs a few steps: without optimizations, and without emitters
# by which a train step of a small network compiles more than twice as long.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# The same programs are run again and again: each is compiled once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="d2f-jax-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


def pytest_collection_finish() -> None:
    """PyTorch, JAX and all else that was imported need not be looked through at every collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def what_a_module_held_is_given_back() -> Iterator[None]:
    """Compiled programs, and memory that glibc would keep: networks of full size leave gigabytes behind."""
    yield
    import jax  # reads what is set above when it is imported, so not before

    gc.collect()
    jax.clear_caches()
    if sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)
