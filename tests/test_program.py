"""Bad input ends with one line on stderr and exit code 2, and leaves nothing behind."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def start(*arguments: str, cwd: Path = ROOT, xla_flags: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
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


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("--config.train.num_step=3", "no key 'num_step'"),
        ("--config.train.num_steps=many", "many"),
        ("--config.train.batch_size=0", "batch_size=0"),
        ("--config.model=no/where/at/all", "no/where/at/all"),
        ("--config.data.source=cloud", "'cloud'"),
        ("--config.data.image_size=50", "50"),
        ("--config.data.num_train=0", "num_train=0"),
        ("--config.convention=approximate", "approximate"),
        ("--config.compute_dtype=float7", "float7"),
        ("--config.data.caption_dropout=1.5", "caption_dropout=1.5"),
        ("--config.eval.step_counts=(1,0)", "step_counts=(1, 0)"),
        ("--config.train.max_grad_norm=-1.0", "max_grad_norm=-1.0"),
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
    assert ":qlora" in refused(train(tmp_path / "run", config="configs/quickstart.py:qlora"))


def test_missing_flags() -> None:
    assert "--workdir" in refused(start("d2f_jax.train", "--config=configs/quickstart.py"))


def test_workdir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in refused(train(tmp_path / "file" / "run"))


def test_workdir_of_another_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"seed": 7}')
    line = refused(train(tmp_path))
    assert "config.seed" in line and "another --workdir" in line
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
    config = f"configs/images.py:{tmp_path / 'pictures'}"
    assert "metadata.jsonl" in refused(train(tmp_path / "run", config=config))
    assert not (tmp_path / "run").exists()


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
        (["--model=tiny-sd", "--prompt=a", "--height=61"], "height=61"),
        (["--model=tiny-sd", "--prompt=a", "--sampler=magic"], "magic"),
    ],
)
def test_bad_sampling(tmp_path: Path, arguments: list[str], said: str) -> None:
    assert said in refused(start("d2f_jax.sample", *arguments, cwd=tmp_path))
    assert not list(tmp_path.iterdir())
