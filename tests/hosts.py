"""A program as two processes, each with devices of its own, as two hosts would run it."""

import os
import subprocess
import sys
from pathlib import Path

from ml_collections import ConfigDict

from d2f_jax.settings import flat

ROOT = Path(__file__).parents[1]


def two(module: str, *arguments: object, devices: int) -> str:
    """What both have told, after they have ended well."""
    command = ["launch/local_hosts.sh", "2", f"--devices={devices}", f"--module={module}", "--", *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHON": sys.executable}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]
    return ran.stdout


def changes(config: ConfigDict, usual: ConfigDict) -> list[str]:
    """Arguments that make the `usual` config the other one, but for its model."""
    wanted, before = flat(config.to_dict()), flat(usual.to_dict())
    return [f"--{key}={x}" for key, x in wanted.items() if x != before[key] and key != "config.model"]
