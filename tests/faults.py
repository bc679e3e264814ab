"""What training survives: kills, a full disk, damaged checkpoints, the loss of one of two processes.

    python tests/faults.py [--kills=30] [--seed=0] [--devices=4] [--workdir=DIR]

Each run is started again by the same command, and must end as one that nothing happened to: the same checkpoint, export
and losses, bit for bit. Prints a table of what was shown; exit code 1 if a law is broken. `test_faults.py` is the short
form.

What it showed on two cores, 2026-11-25, in 28 minutes; 679 arrays, 11 exported files and all losses were the same:

| fault                                               | what was seen                                              |
|-----------------------------------------------------|------------------------------------------------------------|
| 30 x SIGKILL, over eight runs of 400 steps          | 17 in a save, 5 between saves, 6 before the first step and |
|                                                     | 2 after the last                                           |
| disk full in a save                                 | one line names the step that was lost and the one kept     |
| 60 damages, of each file of a checkpoint            | each is told                                               |
| the newest checkpoint cut, changed, a file removed, | named and passed over; the run goes on from the one before |
| and three checkpoints in a row                      |                                                            |
| SIGKILL to either of two processes, between and     | the other ends after 0.1 to 0.3 s                          |
| during saves                                        |                                                            |
| SIGTERM to one of two processes                     | both save step 44 of 60 and stop                           |
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import small
from tqdm import tqdm

from d2f_jax.checkpoint import damage
from d2f_jax.data.shapes_world import shapes_world
from d2f_jax.report import markdown_table

ROOT = Path(__file__).parents[1]
HANGS = 600  # seconds after which a run counts as one that never ends
NOTICED = 60  # seconds in which a process has to notice that another one is gone
BATCH, KEPT = 8, 4  # pictures in a batch, checkpoints
SCENES = {"num_train": 24, "num_validation": 4}


@dataclasses.dataclass(frozen=True)
class Job:
    """A command that trains a small network on `processes` of this machine, with `devices` in each."""

    folder: Path  # of what all its runs share: model, data, compiled programs
    steps: int = 40
    every: int = 5  # steps between checkpoints
    processes: int = 1
    devices: int = 1

    def prepare(self) -> "Job":
        """Writes the model and the data."""
        small.write_pipeline(self.folder / "model")
        for split in ("train", "validation"):
            shapes_world(self.folder / "data", size=16, split=split, **SCENES)
        return self

    def command(self, workdir: Path) -> list[str]:
        config = {
            "model": self.folder / "model",
            "mesh.data": 1,
            "mesh.fsdp": self.processes * self.devices,
            "data.sources": f"('shapes_world:{self.folder / 'data'}',)",
            "data.image_size": 16,
            **{f"data.{name}": count for name, count in SCENES.items()},
            "train.num_steps": self.steps,
            "train.batch_size": BATCH,
            "train.warmup_steps": 2,
            "train.log_every": 1,
            "train.checkpoint_every": self.every,
            "train.checkpoints_kept": KEPT,
            "eval.every": self.steps,
            "eval.num_loss_examples": 4,
            "eval.step_counts": "(1,)",
            "eval.num_images": 2,
            "eval.batch_size": 2,
            "eval.grid_images": 2,
        }
        given = [f"--config.{name}={value}" for name, value in config.items()]
        return [sys.executable, "-m", "d2f_jax.train", "--config=configs/quickstart.py", f"--workdir={workdir}", *given]

    def environment(self, process: int, port: int) -> dict[str, str]:
        """One process finds its devices only; several find each other."""
        devices = f"--xla_force_host_platform_device_count={self.devices}"
        variables = {
            **{name: value for name, value in os.environ.items() if not name.startswith("JAX_")},
            "JAX_PLATFORMS": "cpu",
            # They compile sooner.
            "XLA_FLAGS": f"--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false {devices}",
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        if self.processes > 1:
            variables |= {
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(self.processes),
                "JAX_PROCESS_ID": str(process),
            }
        return variables

    @contextlib.contextmanager
    def started(self, workdir: Path, first: int | None = None) -> Iterator[list["Process"]]:
        """Its processes, which go on from step `first`: the newest checkpoint if None. At the end they are killed."""
        first = [0, *saved(workdir)][-1] if first is None else first
        logs = self.folder / "logs"
        logs.mkdir(exist_ok=True)
        number, port, processes = len(list(logs.glob("*.0.log"))), free_port(), []
        try:
            for i in range(self.processes):
                log = logs / f"{number:03}-{workdir.name}.{i}.log"
                processes.append(Process(self.command(workdir), self.environment(i, port), log))
            yield processes
        finally:
            for process in processes:
                process.end(signal.SIGKILL)
        began = processes[0].began()
        assert began in (first, None), f"went on from step {began} and not {first}: {processes[0].log}"

    def export(self, workdir: Path) -> None:
        """Lets it run to the exported result; the samples after that, which are not compared, take as long again."""
        with self.started(workdir) as processes:
            exported = processes[0].wait_until(lambda process: bool(process.lines("sampling")))
            assert exported, f"ended, and no fault was made: {processes[0].log}\n{processes[0].told()}"

    def finish(self, workdir: Path) -> float:
        """Starts it and lets it end; returns the seconds that took."""
        begun = time.monotonic()
        with self.started(workdir) as processes:
            for process in processes:
                code = process.wait(HANGS)
                assert code == 0, f"exit code {code}, and no fault was made: {process.log}\n{process.told()}"
        return time.monotonic() - begun


class Process:
    """A running program whose output goes to a file."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path):
        self.log, self.begun = log, time.time()
        with log.open("w") as output:
            self._popen = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        self.id = self._popen.pid

    def wait(self, seconds: float) -> int | None:
        """The exit code, negative for a signal; None if it still runs after `seconds`."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._popen.wait(seconds)
        return None

    def wait_until(self, reached: Callable[["Process"], bool]) -> bool:
        """Whether it ran until that was reached; otherwise it has ended."""
        deadline = time.monotonic() + HANGS
        while not reached(self):
            if self._popen.poll() is not None:
                return False
            assert time.monotonic() < deadline, f"no progress for {HANGS} s: {self.log}"
            time.sleep(0.005)
        return True

    def end(self, number: signal.Signals) -> int:
        if self._popen.poll() is None:
            self._popen.send_signal(number)
        return self._popen.wait(HANGS)

    def began(self) -> int | None:
        """The step from which it trains, by its progress bar; None if it did not come to that."""
        bar = re.search(r"^training: .*?(\d+)/\d+ \[", self.log.read_text(errors="replace"), re.MULTILINE)
        return int(bar[1]) // BATCH if bar else None

    def told(self) -> str:
        """The last of its lines that tells why it ended."""
        lines = self.lines("error: ", "stopped: ")
        return lines[-1] if lines else ""

    def lines(self, *beginnings: str) -> list[str]:
        return [line for line in self.log.read_text(errors="replace").splitlines() if line.startswith(beginnings)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def saved(workdir: Path) -> list[int]:
    """Steps of the checkpoints, the newest last."""
    folder = workdir / "checkpoints"
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.exists() else []


def saving(workdir: Path) -> Callable[[Process], bool]:
    """Whether a process is in the middle of a save: Orbax's temporary folder is there, and not from before it."""

    def begun(process: Process) -> bool:
        for part in (workdir / "checkpoints").glob("*orbax-checkpoint-tmp*"):
            with contextlib.suppress(FileNotFoundError):
                return part.stat().st_mtime > process.begun
        return False

    return begun


def stepped(workdir: Path, process: Process) -> int:
    """The last step of which a process wrote the loss; 0 if it wrote none."""
    file = workdir / "metrics.jsonl"
    if not file.exists() or file.stat().st_mtime < process.begun:
        return 0
    steps = [json.loads(line)["step"] for line in file.read_text().split("\n")[:-1]]
    return max((step for step in steps if step > process_first(workdir, process)), default=0)


def process_first(workdir: Path, process: Process) -> int:
    """The newest checkpoint from before a process."""
    folders = [workdir / "checkpoints" / str(step) for step in saved(workdir)]
    return max((int(folder.name) for folder in folders if folder.stat().st_mtime < process.begun), default=0)


def between_saves(workdir: Path, step: int) -> Callable[[Process], bool]:
    """Whether a process has come to `step`, and nothing is being saved."""
    return lambda process: stepped(workdir, process) >= step and not saving(workdir)(process)


def outcome(workdir: Path) -> dict[str, Any]:
    """All that must not depend on what happened on the way: arrays and files as bytes, losses as numbers, by name."""
    newest = workdir / "checkpoints" / str(saved(workdir)[-1])
    fault = damage(newest)
    assert fault is None, f"the last checkpoint of {workdir} is damaged: {fault}"
    # Their number, not their steps: a run that was told to make room has saved one more.
    found: dict[str, Any] = {"checkpoints": (len(saved(workdir)[-KEPT:]), newest.name)}
    for path, array in jax.tree_util.tree_leaves_with_path(arrays(newest / "state")):
        found[jax.tree_util.keystr(path)] = (str(array.dtype), array.shape, array.tobytes())
    for file in sorted((workdir / "export").rglob("*")):
        found |= {str(file.relative_to(workdir)): file.read_bytes()} if file.is_file() else {}
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [(record["step"], record["loss"], record["grad_norm"]) for record in records if "loss" in record]
    steps = [step for step, *_ in losses]
    assert steps == list(range(1, len(steps) + 1)), f"{workdir}/metrics.jsonl has the losses of steps {steps}"
    return found | {f"loss of step {step}": values for step, *values in losses}


def arrays(state: Path) -> Any:
    """A saved train state, whole and in NumPy, whatever devices it was on."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(state).item_metadata.tree
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(state, restore_args=restore_args)


def assert_as_if_nothing_happened(workdir: Path, expected: dict[str, Any]) -> None:
    found = outcome(workdir)
    differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    assert not differing, f"{workdir} differs from the uninterrupted run: {', '.join(differing[:9])}"
    parts = [str(p.relative_to(workdir)) for p in workdir.rglob("*") if p.name.endswith(".part") or "-tmp" in p.name]
    # One that was being deleted when the run was killed may still be there, in part; the next save would finish that.
    kept = [workdir / "checkpoints" / str(step) for step in saved(workdir)[-KEPT:]]
    parts += [f"checkpoints/{p.name}" for p in kept if damage(p) is not None]
    assert not parts, f"{workdir} keeps what a fault has left: {', '.join(parts[:9])}"


def survive_kills(
    job: Job, folder: Path, expected: dict[str, Any], *, count: int, span: float, seed: int, bar: Any = None
) -> collections.Counter[str]:
    """SIGKILL `count` times: a third of them in a save, the others anywhere in the `span` seconds of a run.

    A run that is done goes on as a new one. Returns where the kills hit.
    """
    rng, hits, runs = random.Random(seed), collections.Counter(), 1
    workdir = folder / f"killed-{runs}"
    while True:
        left = count - hits.total()
        with job.started(workdir) as [process]:
            if left and hits.total() % 3 == 0:
                if process.wait_until(saving(workdir)):
                    process.wait(0.04 * (hits.total() // 3 % 6))  # each time a little later in the save
            elif left:
                process.wait(rng.uniform(0, span))
            else:
                process.wait(HANGS)
            code = process.end(signal.SIGKILL)
            if code == -signal.SIGKILL:
                assert left, f"the run did not end in {HANGS} s: {process.log}"
                hits[moment(job, workdir, process)] += 1
                if bar is not None:
                    bar.update()
                continue
        assert code == 0, f"exit code {code} after kills: {process.log}\n{process.told()}"
        assert_as_if_nothing_happened(workdir, expected)
        if not left:
            return hits
        runs += 1
        workdir = folder / f"killed-{runs}"


def moment(job: Job, workdir: Path, process: Process) -> str:
    """What a process that was killed was at."""
    if saving(workdir)(process):
        return "during a save"
    if (step := stepped(workdir, process)) == 0:
        return "before the first step"
    return "between saves" if step < job.steps else "after the last step"


def survive_a_full_disk(job: Job, folder: Path, expected: dict[str, Any], checkpoint_bytes: int) -> str:
    """A save for which the disk has no room ends the run with one line; with room the same command goes on.

    The disk is one of memory, where this process may mount one; otherwise it is a limit to the size of files. Returns
    the line.
    """
    disk = folder / "disk"
    workdir = disk / "run"
    with small_disk(disk, int(2.5 * checkpoint_bytes)) as make_room:
        with job.started(workdir) as [process]:
            if make_room is None:
                assert process.wait_until(lambda _: len(saved(workdir)) >= 2), f"nothing was saved: {process.log}"
                limit = 1 << 17  # bytes, less than the largest file of a checkpoint
                resource.prlimit(process.id, resource.RLIMIT_FSIZE, (limit, limit))
            code = process.wait(HANGS)
        assert code == 1, f"exit code {code} when the disk was full: {process.log}"
        assert len(process.lines("error: ")) == 1, f"not told in one line: {process.log}"
        line = process.told()
        why = "No space left on device" if make_room else "File too large"
        told = re.search(rf"checkpoint of step (\d+) was not written .*{why}.*; that of step (\d+) is whole; ", line)
        assert told, f"the line does not tell why, and what is whole: {line}"
        lost, whole = int(told[1]), int(told[2])
        assert saved(workdir)[-1] == whole == lost - job.every, f"{saved(workdir)} are saved, but it is told: {line}"
        assert damage(workdir / "checkpoints" / str(whole)) is None
        if make_room is not None:
            make_room()
        job.finish(workdir)
        assert_as_if_nothing_happened(workdir, expected)
    return line


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[], Any] | None]:
    """A disk of `size` bytes at `folder`, and how to make it larger; None where none can be mounted."""
    folder.mkdir(parents=True)

    def mount(options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if os.geteuid() != 0 or not shutil.which("mount") or not mount(f"size={size}"):
        yield None
        return
    try:
        yield lambda: mount("remount,size=1g")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def cut(file: Path, rng: random.Random) -> None:
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def remove(file: Path, rng: random.Random) -> None:
    file.unlink()


Damage = Callable[[Path, random.Random], None]
DAMAGES: tuple[Damage, ...] = (flip, cut, remove)


def sealed(checkpoint: Path) -> list[Path]:
    """The files from which the state and the position are restored, and the seal itself."""
    files = [file for file in sorted(checkpoint.glob("*/**/*")) if file.is_file() and file.stem != "commit_success"]
    return [*files, checkpoint / "seal.json"]


def unnoticed(finished: Path, folder: Path, seed: int) -> tuple[int, list[str]]:
    """Damages each file of the newest checkpoint in each way. Returns how many, and those of which nothing is told."""
    rng, silent, count = random.Random(seed), [], 0
    newest, copy = finished / "checkpoints" / str(saved(finished)[-1]), folder / "one-by-one"
    shutil.copytree(newest, copy)
    for file in sealed(copy):
        content = file.read_bytes()
        for spoil in DAMAGES:
            spoil(file, rng)
            count += 1
            if damage(copy) is None:
                silent.append(f"{spoil.__name__} {file.relative_to(copy)}")
            file.write_bytes(content)
    assert damage(copy) is None
    return count, silent


def survive_damage(
    job: Job, folder: Path, expected: dict[str, Any], finished: Path, damages: tuple[Damage, ...], seed: int
) -> list[str]:
    """The newest checkpoints of a finished run damaged, one in each of these ways: the one before them is used.

    Returns what is told of them.
    """
    rng, workdir = random.Random(seed), folder / f"damaged-{'-'.join(spoil.__name__ for spoil in damages)}-{seed}"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "export")
    steps = saved(workdir)
    before, damaged = steps[-len(damages) - 1], steps[-len(damages) :]
    for step, spoil in zip(damaged, damages, strict=True):
        spoil(rng.choice(sealed(workdir / "checkpoints" / str(step))), rng)
        assert damage(workdir / "checkpoints" / str(step))
    with job.started(workdir, before) as [process]:
        code = process.wait(HANGS)
    assert code == 0, f"exit code {code} with damaged checkpoints: {process.log}\n{process.told()}"
    told = re.findall(r"checkpoint (\d+) of \S+ is damaged and passed over: (.*)", process.log.read_text())
    assert [int(step) for step, _ in told] == damaged[::-1], f"not each of {damaged} is told of once: {process.log}"
    assert process.began() == before
    assert_as_if_nothing_happened(workdir, expected)
    return [why for _, why in told]


def lose(job: Job, workdir: Path, victim: int, reached: Callable[[Process], bool]) -> tuple[float, str]:
    """SIGKILL to one of two processes when the first has `reached` something.

    Returns after how many seconds the other has ended, and its line.
    """
    with job.started(workdir) as processes:
        assert processes[0].wait_until(reached), f"ended before it was killed: {processes[0].log}"
        lost, other = processes[victim], processes[1 - victim]
        assert lost.end(signal.SIGKILL) == -signal.SIGKILL, f"ended before it was killed: {lost.log}"
        since = time.monotonic()
        code = other.wait(NOTICED)
        seconds = time.monotonic() - since
        assert code is not None, f"process {1 - victim} did not notice in {NOTICED} s: {other.log}"
        line = other.told()
        assert code == 1 and line.startswith("error: "), f"exit code {code} and told {line!r}: {other.log}"
    return seconds, line


def warn(job: Job, workdir: Path, whom: int, reached: Callable[[Process], bool]) -> str:
    """SIGTERM to one of two processes: both save and stop at the same step. Returns their line."""
    with job.started(workdir) as processes:
        assert processes[0].wait_until(reached), f"ended before it was warned: {processes[0].log}"
        os.kill(processes[whom].id, signal.SIGTERM)
        codes = [process.wait(HANGS) for process in processes]
        lines = {process.told() for process in processes}
    assert codes == [75, 75], f"exit codes {codes}, {lines}: {processes[0].log}"
    assert len(lines) == 1, f"they stopped at different steps: {lines}"
    line = lines.pop()
    told = re.search(r"^stopped: .* at step (\d+) of ", line)
    assert told and saved(workdir)[-1] == int(told[1]), f"{saved(workdir)} are saved, but it is told: {line}"
    assert damage(workdir / "checkpoints" / told[1]) is None
    return line


def size_on_disk(folder: Path) -> int:
    blocks = 4096
    return sum(blocks * math.ceil(max(p.stat().st_size, 1) / blocks) for p in folder.rglob("*"))


def tell(expected: dict[str, Any]) -> str:
    """What is compared, in numbers."""
    kinds = collections.Counter(
        "arrays" if name.startswith("[") else "losses" if name.startswith("loss") else "files" for name in expected
    )
    return ", ".join(f"{kinds[kind]} {kind}" for kind in ("arrays", "files", "losses"))


class Table:
    """Rows of what was shown; a broken law is a row too, and the rest goes on."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._rows = folder, list[list[str]]()
        self.broken = False

    @contextlib.contextmanager
    def row(self, fault: str) -> Iterator[list[str]]:
        begun, said = time.monotonic(), []
        try:
            yield said
        except AssertionError as error:
            self.broken = True
            said.append(f"BROKEN: {error}")
        for k, part in enumerate(said or [""]):
            text = textwrap.shorten(part.replace(str(self._folder), "..."), 200, placeholder=" ...")
            self._rows.append(["" if k else fault, text, "" if k else f"{time.monotonic() - begun:.0f}"])

    def __str__(self) -> str:
        return markdown_table(["fault", "what was seen", "seconds"], self._rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="of one process, at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the damages")
    parser.add_argument("--devices", type=int, default=4, help="of each of two processes")
    parser.add_argument("--workdir", type=Path, help="kept with all runs and their logs; a temporary one if not given")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with contextlib.ExitStack() as stack:
        given = args.workdir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="d2f-jax-faults-")))
        folder = given.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"--workdir={given} is not empty")
        table = show(folder, args.kills, args.seed, args.devices)
    print(f"\n{table}")
    return 1 if table.broken else 0


def show(folder: Path, kills: int, seed: int, devices: int) -> Table:
    table, job = Table(folder), Job(folder / "shared", steps=400, every=40).prepare()
    pair = dataclasses.replace(job, steps=60, every=10, processes=2, devices=devices)
    losses = [(victim, where) for where in ("between saves", "during a save") for victim in (1, 0)]
    with tqdm(total=kills + 12, desc="uninterrupted", unit="fault") as bar:
        finished = folder / "uninterrupted"
        job.finish(finished)
        span = job.finish(folder / "again")  # now that all is compiled
        expected = outcome(finished)
        same = f"in the end as if nothing had happened: {tell(expected)}"
        assert_as_if_nothing_happened(folder / "again", expected)
        bar.set_description("SIGKILL")
        with table.row(f"{kills} x SIGKILL") as said:
            hits = survive_kills(job, folder, expected, count=kills, span=span, seed=seed, bar=bar)
            said += [", ".join(f"{count} {where}" for where, count in hits.most_common()), same]
        bar.set_description("full disk")
        with table.row("disk full in a save") as said:
            newest = finished / "checkpoints" / str(job.steps)
            said += [survive_a_full_disk(job, folder / "full", expected, size_on_disk(newest)), same]
        bar.update()
        bar.set_description("damage")
        with table.row("each file of a checkpoint damaged") as said:
            count, silent = unnoticed(finished, folder, seed)
            assert not silent, f"nothing is told of: {', '.join(silent)}"
            said.append(f"{count} damages, each is told")
        bar.update()
        for k, damages in enumerate([*((one,) for one in DAMAGES), DAMAGES]):
            with table.row(f"newest checkpoints damaged: {', '.join(one.__name__ for one in damages)}") as said:
                said += [*survive_damage(job, folder, expected, finished, damages, seed + k), same]
            bar.update()
        bar.set_description("two processes")
        pair.finish(folder / "two")
        expected, workdir = outcome(folder / "two"), folder / "two-killed"
        bar.update()
        for k, (victim, where) in enumerate(losses):
            with table.row(f"SIGKILL to process {victim} of 2, {where}") as said:
                reached = between_saves(workdir, 10 * k + 12) if where == "between saves" else saving(workdir)
                seconds, line = lose(pair, workdir, victim, reached)
                said.append(f"the other after {seconds:.1f} s: {line}")
            bar.update()
        with table.row("SIGTERM to process 1 of 2") as said:
            said.append(warn(pair, workdir, 1, between_saves(workdir, 42)))
            pair.finish(workdir)
            assert_as_if_nothing_happened(workdir, expected)
            said.append(f"in the end as if nothing had happened: {tell(expected)}")
        bar.update()
    return table


if __name__ == "__main__":
    sys.exit(main())
