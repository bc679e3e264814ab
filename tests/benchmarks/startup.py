"""From the start of the process to the first step: without and with the compile cache, and what of it goes where.

    python tests/benchmarks/startup.py

Runs the quickstart's `d2f_jax.train` on pictures that are rendered already until its first step is told, in a fresh
process each time: first with an empty cache of compiled programs, then with the one that this has left. The record goes
to results/benchmarks/startup_DEVICE.json.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from against_pytorch import told_by

ROOT = Path(__file__).parents[2]


def main() -> None:
    device = told_by("device")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
        train(folder, "world", environment)  # renders the pictures, which is not what this is about
        environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "empty")
        seconds = {kind: train(folder, kind, environment) for kind in ("cold", "warm")}
    record = {"seconds": seconds, "device": device, "date": time.strftime("%Y-%m-%d", time.gmtime())}
    kind = "cpu" if device["platform"] == "cpu" else device["kind"].lower().replace(" ", "_")
    (ROOT / "results" / "benchmarks" / f"startup_{kind}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(record)


def train(folder: Path, name: str, environment: dict[str, str]) -> float:
    """Seconds until the first line of metrics."""
    workdir = folder / name
    command = [sys.executable, "-m", "d2f_jax.train", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    command += ["--config.train.num_steps=2", "--config.train.log_every=1", "--config.eval.every=1000"]
    command += [f"--config.data.sources=('shapes_world:{folder / 'pictures'}',)"]
    metrics = workdir / "metrics.jsonl"
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    process.kill()
    process.wait()
    if not metrics.exists():
        sys.exit(f"{' '.join(command)}: ended before its first step")
    return seconds


if __name__ == "__main__":
    main()
