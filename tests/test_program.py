"""Bad input ends with one line on stderr and exit code 2, and leaves nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import small

from d2f_jax import program

ROOT = Path(__file__).parents[1]


def environment(xla_flags: str = "", **more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "XLA_FLAGS": xla_flags, **more}


def start(*arguments: str, cwd: Path = ROOT, xla_flags: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env=environment(xla_flags),
        capture_output=True,
        text=True,
        timeout=300,
    )


def train(workdir: Path, *arguments: str, config: str = "configs/quickstart.py") -> subprocess.CompletedProcess[str]:
    return start("d2f_jax.train", f"--config={config}", f"--workdir={workdir}", *arguments)


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of the refusal."""
    assert result.returncode == 2, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_programs_begin_without_what_takes_long_to_import() -> None:
    """PyTorch and TensorFlow are there as the tests run; the others are imported where they are used."""
    modules = [file.stem for file in (ROOT / "d2f_jax").glob("*.py") if "program.run(main)" in file.read_text()]
    assert {"train", "sample", "evaluate", "plan", "prepare", "reflow", "convert"} <= set(modules)
    imports = f"import sys, {', '.join(f'd2f_jax.{name}' for name in modules)}"
    slow = ("torch", "tensorflow", "transformers", "diffrax", "scipy.linalg")
    told = [sys.executable, "-c", f"{imports}; print([x for x in {slow} if x in sys.modules])"]
    assert subprocess.run(told, cwd=ROOT, env=environment(), capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--config.train.num_step=3", "no key 'num_step'"),
        ("--config.trane.num_steps=3", "no key 'trane'; Did you mean train instead of trane?"),
        ("--config.train.num_steps=many", "many"),
        ("--config.train.accumulate=3", "does not divide over 1 devices x 3 parts"),
        ("--config.model=no/where/at/all", "no/where/at/all"),
        ("--config.data.sources=('cloud:9',)", "no kind 'cloud'; kinds are array_record, coco, depth_list, hypersim"),
        ("--config.data.image_size=50", "50"),
        ("--config.init_from=nowhere", "error: nowhere holds no checkpoint; give the checkpoints/ of a workdir"),
        ("--config.mesh.fsdp=3", "config.mesh.data=-1, config.mesh.fsdp=3 make no mesh of 1 devices"),
        ("--config.train.optimizer=sgd", "config.train.optimizer='sgd' is unknown; use one of adamw"),
        ("--config.train.schedule=linear", "config.train.schedule='linear' is unknown; use one of constant"),
        ("--config.remat=all", "config.remat='all' is unknown; use one of none"),
        ("stray", "stray"),
    ],
)
def test_bad_settings(tmp_path: Path, override: str, said: str) -> None:
    workdir = tmp_path / "run"
    assert said in refused(train(workdir, override))
    assert not workdir.exists()


def test_missing_config_file(tmp_path: Path) -> None:
    assert "nothing.py" in refused(train(tmp_path / "run", config="configs/nothing.py"))


def test_unknown_config_argument(tmp_path: Path) -> None:
    line = refused(train(tmp_path / "run", config="configs/quickstart.py:qlora"))
    assert line.startswith("error: configs/quickstart.py:qlora")


def test_an_override_before_the_config(tmp_path: Path) -> None:
    given = ["--config.train.num_steps=3", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
    assert "--config.train.num_steps=3 stands before --config; put --config=FILE" in refused(
        start("d2f_jax.train", *given)
    )


def test_a_source_that_the_shell_took_apart(tmp_path: Path) -> None:
    shards = [f"--config=configs/images.py:webdataset:{n}.tar" for n in range(3)]
    line = refused(start("d2f_jax.train", *shards, f"--workdir={tmp_path / 'run'}"))
    assert "--config is given 3 times, last as --config=configs/images.py:webdataset:2.tar" in line and "quote" in line


def test_a_config_by_its_absolute_path(tmp_path: Path) -> None:
    """Its file imports others of its folder, though only the package is installed and the program starts elsewhere."""
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "d2f_jax").symlink_to(ROOT / "d2f_jax")
    config = f"--config={ROOT / 'configs/depth.py'}:diff2flow"
    result = subprocess.run(
        [sys.executable, "-m", "d2f_jax.train", config, "--workdir=run", "--config.train.batch_size=0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert "batch_size=0" in refused(result)


def test_out_of_memory_is_told_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code = program._guarded(lambda: jax.block_until_ready(jnp.zeros((2**20, 2**20, 2**10))))
    told = capsys.readouterr().err
    assert code == 2 and told.count("\n") == 1 and told.startswith("error: a device has not enough memory (")
    for name in ("train.accumulate", "remat=elementwise", "mesh.fsdp", "train.batch_size", "eval.batch_size"):
        assert f"config.{name}" in told


def test_missing_flags() -> None:
    assert "--workdir" in refused(start("d2f_jax.train", "--config=configs/quickstart.py"))


def test_workdir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in refused(train(tmp_path / "file" / "run"))


def test_workdir_of_another_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"seed": 7}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}')
    line = refused(train(tmp_path))
    assert "config.seed (7 there, 0 here)" in line and "another --workdir" in line
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "metrics.jsonl"}
    assert (tmp_path / "config.json").read_text() == '{"seed": 7}'


def test_batch_that_does_not_divide(tmp_path: Path) -> None:
    result = start(
        "d2f_jax.train",
        "--config=configs/quickstart.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.train.batch_size=6",
        xla_flags="--xla_force_host_platform_device_count=4",
    )
    assert "batch_size=6 does not divide over 4 devices; use a multiple of 4" in refused(result)
    assert not (tmp_path / "run").exists()


def test_truncated_weights(tmp_path: Path) -> None:
    model = shutil.copytree(ROOT / "d2f_jax" / "assets" / "tiny-sd", tmp_path / "model")
    file = model / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    line = refused(train(tmp_path / "run", f"--config.model={model}"))
    assert str(file) in line and "is damaged" in line
    assert not (tmp_path / "run").exists()


def test_empty_image_folder(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    config = f"configs/images.py:image_folder:{tmp_path / 'pictures'}"
    assert "metadata.jsonl" in refused(train(tmp_path / "run", config=config))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_pipeline(tmp_path_factory.mktemp("model"))


def test_told_to_make_room_and_started_again(model: Path, tmp_path: Path) -> None:
    """The second start goes on where the first has saved, with what the first has compiled."""
    workdir, compiled = tmp_path / "run", tmp_path / "cache" / "d2f_jax" / "compiled"
    command = [sys.executable, "-m", "d2f_jax.train", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    command += [f"--config.model={model}", "--config.data.image_size=16", "--config.data.num_train=16"]
    command += ["--config.data.num_validation=2", "--config.train.num_steps=150", "--config.train.batch_size=2"]
    command += ["--config.train.log_every=1", "--config.train.checkpoint_every=1000", "--config.eval.every=1000"]
    command += ["--config.eval.step_counts=(1,)", "--config.eval.num_images=2"]
    options = {"cwd": ROOT, "stderr": subprocess.PIPE, "text": True}
    options["env"] = environment(XDG_CACHE_HOME=str(tmp_path / "cache"), JAX_COMPILATION_CACHE_DIR="")

    def told() -> list[int]:
        file = workdir / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [json.loads(line)["step"] for line in lines if "validation" not in line]

    def steps_compiled() -> set[str]:
        return {file.name for file in compiled.iterdir() if file.name.startswith("jit_step-")}

    with subprocess.Popen(command, **options) as running:
        while running.poll() is None and not told():
            time.sleep(0.01)
        running.send_signal(signal.SIGTERM)
        _, stderr = running.communicate(timeout=120)
    assert running.returncode == 75, stderr[-2000:]
    last = told()[-1]
    assert stderr.splitlines()[-1].startswith(f"stopped: told to make room at step {last} of 150, and saved;")
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == [str(last)]
    assert not (workdir / "export").exists()
    before = steps_compiled()
    assert before
    again = subprocess.run(command, **options, timeout=300)
    assert again.returncode == 0, again.stderr[-2000:]
    assert told() == list(range(1, 151)) and (workdir / "export").exists()
    assert steps_compiled() == before


def test_what_is_compiled_is_kept_where_jax_is_told(model: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "d2f_jax.sample", f"--model={model}", "--prompt=a cone", "--num_steps=1"],
        cwd=tmp_path,
        env=environment(XDG_CACHE_HOME=str(tmp_path / "cache"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own")),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert any((tmp_path / "own").iterdir()) and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model=tiny-sd"], "no prompt"),
        (["--prompt=a red cube"], "--model"),
        (["--model=tiny-sd", "--prompt_file=nowhere.txt"], "nowhere.txt"),
        (["--model=tiny-sd", "--prompt=a", "--out=no/folder/a.png"], "no/folder"),
        (["--model=tiny-sd", "--prompt=a", "--out=a.psd"], "'.psd'"),
        (["--model=tiny-sd", "--prompt=a", "--num_steps=0"], "num_steps=0"),
        (["--model=tiny-sd", "--prompt=a", "--batch_size=0"], "batch_size=0"),
        (["--model=tiny-sd", "--prompt=a", "--height=61"], "error: height=61"),
        (["--model=tiny-sd", "--prompt=a", "--sampler=ddim", "--num_steps=2000"], "error: num_steps=2000"),
        (["--model=tiny-sd", "--image=a.png"], "there is no picture a.png"),
        (["--model=tiny-sd", "--prompt=a", "--sampler=magic"], "magic"),
        (["--model=tiny-sd", "--prompt=a", "--image=a.png"], "--image tells depth, and no prompt has a part in it"),
        (["--model=tiny-sd", "--prompt=a", "--lora=nowhere.safetensors"], "nowhere.safetensors is missing"),
    ],
)
def test_bad_sampling(tmp_path: Path, arguments: list[str], said: str) -> None:
    result = start("d2f_jax.sample", *arguments, cwd=tmp_path)
    assert said in refused(result) and "sampling:" not in result.stderr
    assert not list(tmp_path.iterdir())
