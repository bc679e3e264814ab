"""Several processes as one run: how they find each other, and how they stop together."""

import contextlib
import ctypes
import importlib.util
import itertools
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from d2f_jax.errors import InputError

Value = TypeVar("Value")


class Mergeable(Protocol):
    """What is gathered in parts, such as a metric's sums."""

    def merge(self, other: Self, /) -> Self: ...


Part = TypeVar("Part", bound=Mergeable)

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_HEARTBEAT_SECONDS = 30  # a host that is gone is noticed well within a minute, where no collective fails at once
_SHUTDOWN_SECONDS = 60
_BARRIER_SECONDS = 6 * 3600  # one process may render a data set or write gigabytes while the others wait
_barriers = itertools.count()


def initialize() -> None:
    """Joins the processes of a run; a single host needs nothing and this does nothing.

    Explicit: the environment variables JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. By themselves: TPU pods (Compute Engine and GKE, one slice or many), Slurm steps of several tasks.
    To be called before JAX is used. Raises InputError for variables that are incomplete or make no sense.
    """
    options = _explicit(os.environ) or _detected(os.environ)
    if options is not None:
        jax.distributed.initialize(
            **options, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS, shutdown_timeout_seconds=_SHUTDOWN_SECONDS
        )
        _tell_losses()


def is_main() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here; to be called by all of them in the same order.

    The wait is the coordination service's: a collective of the devices would give up after half a minute on gloo. A
    process that dies ends it.
    """
    key = f"{name} {next(_barriers)}"
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=1000 * _BARRIER_SECONDS)


def main_first(name: str, make: Callable[[], Value]) -> Value:
    """`make()` in the main process, and in the others after it is done: for what is built once and then read."""
    if is_main():
        value = make()
        barrier(name)
        return value
    barrier(name)
    return make()


def from_main(value: int) -> int:
    """The main process's `value`, in every process, however long it takes to find it."""
    barrier("value of the main process")
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def merged(part: Part) -> Part:
    """What all processes have gathered, merged in their order: the same in each of them, to the bit.

    `part` is this process's, of any size; it travels as bytes, so that float64 stays float64, and one after another, so
    that a process holds two parts at a time and not all of them. To be called by every process.
    """
    if jax.process_count() == 1:
        return part
    barrier("parts to merge")
    data = np.frombuffer(pickle.dumps(part), np.uint8)
    whole = None
    for process, size in enumerate(multihost_utils.process_allgather(np.int32(len(data)))):
        mine = process == jax.process_index()
        sent = multihost_utils.broadcast_one_to_all(data if mine else np.zeros(size, np.uint8), is_source=mine)
        arrived = pickle.loads(np.asarray(sent).tobytes())
        whole = arrived if whole is None else whole.merge(arrived)
    return whole  # pyright: ignore[reportReturnType]


class Preemption:
    """Turns SIGTERM, by which Slurm, Kubernetes and preempted TPU hosts warn, into a place where all processes stop.

    SIGUSR1, by which Slurm may be asked to warn (`sbatch --signal=USR1@120`), is taken for it. With several processes a
    warning to any of them counts: JAX's coordination service agrees on the place.
    """

    def __init__(self) -> None:
        self._received, self._asked = False, 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Preemption":
        handlers: dict[signal.Signals, Callable[[int, FrameType | None], None]] = {signal.SIGUSR1: _as_sigterm}
        if not jax.distributed.is_initialized():  # else JAX has one of its own for SIGTERM, and knows of no other
            handlers[signal.SIGTERM] = self._receive
        self._previous = {warning: signal.signal(warning, handler) for warning, handler in handlers.items()}
        return self

    def __exit__(self, *_: object) -> None:
        for warning, handler in self._previous.items():
            signal.signal(warning, handler)

    def reached(self) -> bool:
        """Whether to stop here; to be asked again and again, at the same places by every process."""
        self._asked += 1
        if jax.distributed.is_initialized():
            # JAX says so once; who does not stop at that place asks again.
            self._received |= multihost_utils.reached_preemption_sync_point(self._asked)
        return self._received

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        self._received = True


def _as_sigterm(_number: int, _frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGTERM)


def _tell_losses() -> None:
    """Makes a process that has lost another one end with exit code 1 and one line, and not by JAX's SIGABRT.

    JAX aborts from a thread of its own, often before the main thread has seen its collective or barrier fail. As the
    handler of SIGABRT, C's sleep() holds that thread up by the signal's number, 6 seconds: the main thread has 4 of
    them to end by itself, then a thread of Python ends the process.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
    threading.Thread(target=_end_with_abort, name="losses", daemon=True).start()


def _end_with_abort() -> None:
    while not _aborting():
        time.sleep(1)
    time.sleep(4)
    place = f"process {jax.process_index()} of {jax.process_count()}"
    print(f"error: {place} was ended by JAX, as told above; start the same command again on all hosts", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


def _aborting() -> bool:
    """Whether a thread is in the handler of SIGABRT, which Linux shows by its blocking this signal and no other."""
    alone = f"SigBlk:\t{1 << (signal.SIGABRT - 1):016x}\n"
    for thread in Path("/proc/self/task").glob("*/status"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            if alone in thread.read_text():
                return True
    return False


def _explicit(environment: Mapping[str, str]) -> dict[str, Any] | None:
    given = [name for name in (_ADDRESS, _COUNT, _INDEX) if environment.get(name)]
    if not given:
        return None
    if len(given) < 3:
        missing = sorted({_ADDRESS, _COUNT, _INDEX} - set(given))
        raise InputError(f"{', '.join(given)} given without {', '.join(missing)}; set all three, or none of them")
    address, count, index = (environment[name] for name in (_ADDRESS, _COUNT, _INDEX))
    if not address.rpartition(":")[2].isdigit():
        raise InputError(f"{_ADDRESS}={address} has no port; write host:port")
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise InputError(f"{_INDEX}={index} and {_COUNT}={count}: give whole numbers, the first less than the second")
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}


def _detected(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """Only of clusters where several processes are sure: JAX finds the rest by itself there, and only there."""
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        return {"cluster_detection_method": "slurm"}
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or ""
    if "," in hosts or environment.get("MEGASCALE_NUM_SLICES", "1") != "1":
        return {}
    # On Compute Engine the metadata server knows; that there are TPUs shows in their devices, as libtpu looks for them.
    on_tpu_vm = environment.get("TPU_SKIP_MDS_QUERY") is None and not hosts and _has_tpus()
    return {} if on_tpu_vm else None


def _has_tpus() -> bool:
    devices = os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")
    return devices and importlib.util.find_spec("libtpu") is not None
