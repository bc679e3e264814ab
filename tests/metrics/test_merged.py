"""Metrics gathered by two processes are those of one, to the last bits of float64, and the same in both."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from d2f_jax import distributed
from d2f_jax.metrics import FeatureRows, FeatureStatistics, Means

ROOT = Path(__file__).parents[2]
COUNT = 23
PROGRAM = """
import sys
import jax, numpy as np
from d2f_jax import distributed
from d2f_jax.metrics import FeatureRows, FeatureStatistics, Means
distributed.initialize()
x = np.random.default_rng(0).normal(5, 1, (23, 6)).astype(np.float32)
mine = np.arange(23) % 3 == 2 if jax.process_index() == 0 else np.arange(23) % 3 != 2
statistics = distributed.merged(FeatureStatistics.empty(6).add(x[mine]))
means = distributed.merged(Means().add({"third": x[mine, 0].astype(float) / 3}) if jax.process_index() else Means())
rows = distributed.merged(FeatureRows().add(np.flatnonzero(mine), x[mine])).sorted()
np.savez(sys.argv[1], mean=statistics.mean_F, covariance=statistics.covariance_FxF, rows=rows,
    third=means.means()["third"])
"""


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    running = []
    for process in range(2):
        run = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(process)}
        flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
        environment = {**os.environ, **run, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / f"{process}.npz")]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    told = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    first, second = (dict(np.load(tmp_path / f"{process}.npz")) for process in range(2))
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
    x = np.random.default_rng(0).normal(5, 1, (COUNT, 6)).astype(np.float32)
    np.testing.assert_array_equal(first["rows"], x)
    np.testing.assert_allclose(first["mean"], x.mean(0, dtype=np.float64), rtol=1e-14)
    np.testing.assert_allclose(first["covariance"], np.cov(x.astype(np.float64), rowvar=False), rtol=1e-12)
    assert abs(first["third"] - (x[np.arange(COUNT) % 3 != 2, 0].astype(float) / 3).mean()) < 1e-14


def test_of_one_process_it_is_what_it_was() -> None:
    for part in (Means().add({"a": 1.0}), FeatureRows(), FeatureStatistics.empty(2)):
        assert distributed.merged(part) is part
