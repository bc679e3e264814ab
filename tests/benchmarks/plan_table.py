"""results/plan.md: what finetuning Stable Diffusion 1.5 and 2.1 at 512 pixels needs of several TPUs.

    ./launch/install.sh tpu
    nice .venv/bin/python tests/benchmarks/plan_table.py [--only=v6e]

Asks `d2f_jax.plan --quick` for each row that results/plan/ does not hold yet, one after another; each takes minutes of
fast cores, a quarter of an hour of slow ones, and 11 GB of memory. It can be stopped and goes on: what is known is
kept, and the table is written after each. --only asks for the rows whose names, those of the files, begin so.
"""

import importlib.metadata
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from d2f_jax import report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
MODELS = {"2.1": "", "1.5": ":sd15"}
TRAINED = {"lora_base": ":lora_base", "all": ""}
IMAGES = 4  # on each chip
CHIPS = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1", "v5e:16x16")
Case = tuple[str, str, str, str]  # topology, version, what is trained, config.remat
CASES: list[Case] = list(itertools.product(CHIPS, MODELS, TRAINED, ["elementwise"]))
CASES.insert(CASES.index(("v5e:2x2", "2.1", "all", "elementwise")) + 1, ("v5e:2x2", "2.1", "all", "gathers"))
HEADER = ["Stable Diffusion", "trained", "chips", "remat", "batch", "HBM of a chip, GiB", "arguments", "temporaries"]
HEADER += ["TFLOP of a chip", "HBM traffic, GB", "bound by", "images/s per chip at most", "one operation after another"]
HEADER += ["chip-hours for 20,000 steps"]


def main() -> None:
    only = next((given.removeprefix("--only=") for given in sys.argv[1:]), "")
    wanted = [case for case in CASES if name(case).startswith(only) and not file(case).exists()]
    failed: dict[Case, str] = {}
    write(failed)
    for case in wanted:
        try:
            ask(case)
        except RuntimeError as error:
            failed[case] = f"failed: {error}"
            print(name(case), error, file=sys.stderr)
        write(failed)


def name(case: Case) -> str:
    return "_".join(case).replace(":", "_")


def file(case: Case) -> Path:
    return RESULTS / "plan" / f"{name(case)}.json"


def command(topology: str, config: str, batch: str, remat: str) -> list[str]:
    file = f"configs/text_to_image.py:diff2flow{config}:array_record:PREPARED"
    program = ["python", "-m", "d2f_jax.plan", f"--config={file}"]
    return [*program, f"--topology={topology}", f"--batch_size={batch}", f"--config.remat={remat}", "--quick", "--json"]


def ask(case: Case) -> None:
    topology, version, trained, remat = case
    batch = IMAGES * math.prod(map(int, topology.partition(":")[2].split("x")))
    _, *arguments = command(topology, MODELS[version] + TRAINED[trained], str(batch), remat)
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
    plans = {case: json.loads(file(case).read_text()) for case in CASES if file(case).exists()}
    rows = [row(case, plans.get(case), failed.get(case, "")) for case in CASES if case in plans or case in failed]
    versions = sorted({f"{k} {v}" for plan in plans.values() for k, v in plan["versions"].items()})
    title = "What finetuning Stable Diffusion 1.5 and 2.1 at 512 pixels needs of TPUs, as their compiler has it."
    line = " ".join(command("CHIPS", "[:sd15][:lora_base]", "BATCH", "REMAT"))
    told = f"{', '.join(versions)}; of {len(CASES)} rows {len(CASES) - len(rows)} were not asked yet"
    text = f"{title}\n\n    {line}\n\n{told}\n\n{report.markdown_table(HEADER, rows)}"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "plan.md").write_text(text)


def row(case: Case, plan: dict[str, Any] | None, missing: str) -> list[str]:
    topology, version, trained, remat = case
    cells = [version, trained, topology, remat]
    if plan is None:
        return [*cells, "", missing, *[""] * 8]
    memory = {part: f"{size / 2**30:.2f}" for part, size in plan["memory"].items()}
    cells += [str(plan["batch_size"]), f"{memory['needs']} of {memory['usable']}"]
    if not plan["fits"]:
        return [*cells, "", "", "", "", "does not fit", "", "", ""]
    best, serial = (plan["times"][bound] for bound in ("overlapping", "serial"))
    cells += [memory["arguments"], memory["temporaries"], f"{plan['flops'] / 1e12:.2f}"]
    cells += [f"{sum(plan['hbm'].values()) / 1e9:.1f}", plan["bound_by"]]
    cells += [f"{bound['images_per_second_per_chip']:.1f}" for bound in (best, serial)]
    return [*cells, f"{best['chip_hours']:.2g} to {serial['chip_hours']:.2g}"]


if __name__ == "__main__":
    main()
