"""Eight steps of the training program give the same numbers on any mesh, of one process or of several."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small
from absl import flags
from ml_collections import ConfigDict

from configs import quickstart
from d2f_jax import optim, prior, settings, sharding, train
from d2f_jax.checkpoint import Checkpoints
from d2f_jax.step import TrainState

if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()

ROOT = Path(__file__).parents[1]
STEPS = 8
SETTINGS = {
    "data.image_size": 16,
    "data.num_train": 48,
    "data.num_validation": 6,
    "train.num_steps": STEPS,
    "train.batch_size": 8,
    "train.log_every": 1,
    "train.warmup_steps": 2,
    "eval.every": STEPS,
    "eval.num_loss_examples": 6,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of all runs; the first one renders the data."""
    folder = tmp_path_factory.mktemp("runs")
    small.write_pipeline(folder / "model")
    return folder


@pytest.fixture(scope="module")
def like(folder: Path) -> TrainState:
    """A state of this run on one device, to read others into."""
    of_one = config(folder, 1)
    _, frozen, trained = prior.split(prior.load(of_one), of_one)
    optimizer = optim.make_optimizer(settings.make_optimizer_options(of_one))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return prior.place(mesh, trained, frozen, optimizer, jax.random.key(0))[0]


@pytest.fixture(scope="module")
def one(folder: Path, like: TrainState) -> tuple[list[dict[str, float]], list[np.ndarray]]:
    """What the run on one device tells, and its parameters."""
    workdir = run(folder, processes=1, devices=1, fsdp=1)
    return told(workdir), parameters(workdir, like)


def changes(folder: Path, fsdp: int) -> dict[str, Any]:
    data = (f"shapes_world:{folder / 'data'}",)
    return {"model": str(folder / "model"), "data.sources": data, "mesh.fsdp": fsdp, **SETTINGS}


def config(folder: Path, fsdp: int) -> ConfigDict:
    config = quickstart.get_config()
    config.update_from_flattened_dict(changes(folder, fsdp))
    return config


def run(folder: Path, *, processes: int, devices: int, fsdp: int) -> Path:
    """Trains with so many devices in each process, in this one if it is alone."""
    workdir = folder / f"{processes} x {devices}, {fsdp}"
    if processes == 1:
        with pytest.MonkeyPatch.context() as patch:
            make_mesh = functools.partial(sharding.make_mesh, devices=jax.devices()[:devices])
            patch.setattr(sharding, "make_mesh", make_mesh)
            patch.setattr(train, "finish", lambda *_: None)
            train.train(config(folder, fsdp), workdir)
        return workdir
    launch = ["bash", str(ROOT / "launch/local_hosts.sh"), str(processes), f"--devices={devices}"]
    settings = [f"--config.{name}={value}" for name, value in changes(folder, fsdp).items()]
    done = subprocess.run(
        [*launch, "--module=steps_of_a_run", "--", "--config=configs/quickstart.py", f"--workdir={workdir}", *settings],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT / "tests")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return workdir


def told(workdir: Path) -> list[dict[str, float]]:
    """Losses and gradient norms of the steps, then the validation losses."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: x for k, x in line.items() if not k.endswith(("per_second", "per_device"))} for line in lines]


def parameters(workdir: Path, like: TrainState) -> list[np.ndarray]:
    """Trained ones and their average, of the last checkpoint: devices of any other mesh can read it."""
    with Checkpoints(workdir / "checkpoints", every=1, keep=9) as checkpoints:
        state, _ = checkpoints.restore(like)
    assert int(state.step) == STEPS
    return [np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (state.trained, state.ema)]


@pytest.mark.parametrize(
    ("processes", "devices", "fsdp"),
    [(1, 8, 1), (1, 8, 8), (1, 8, 4), (2, 4, 4), (4, 2, 4)],
    ids=["data", "fsdp", "both", "two processes with a copy each", "four processes, of which two share one"],
)
def test_numbers_do_not_depend_on_the_mesh(
    folder: Path, like: TrainState, one: tuple[Any, Any], processes: int, devices: int, fsdp: int
) -> None:
    workdir = run(folder, processes=processes, devices=devices, fsdp=fsdp)
    lines, (expected, parameters_of_one) = told(workdir), one
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1), STEPS]  # each is told once
    for ours, theirs in zip(lines, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert {"loss", "grad_norm"} < lines[0].keys() and {"validation_loss", "validation_loss/t0.875"} < lines[-1].keys()
    assert len({line["loss"] for line in lines[:-1]}) == STEPS
    for x, y in zip(parameters(workdir, like), parameters_of_one, strict=True):
        assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y) > 0
    assert len(list((workdir / "tensorboard").iterdir())) == 1
