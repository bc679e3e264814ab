"""results/plan.md: what finetuning Stable Diffusion 1.5 and 2.1 at 512 pixels needs of several TPUs.

    ./launch/install.sh tpu
    nice .venv/bin/python tests/benchmarks/plan_table.py [--only=v6e]

Asks `d2f_jax.plan --quick` for each row that results/plan/ does not hold yet, one after another; each takes minutes of
fast cores, up to half an hour of slow ones, and 11 GB of memory. Then it looks for the largest batch of a chip of
v5e, as `d2f_jax.plan --search` does, for two kinds of recomputation. It can be stopped and goes on: what is known is
kept, and the tables are written after each. --only asks for the rows whose names, those of the files, begin so.
"""

import importlib.metadata
import itertools
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d2f_jax import report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
MODELS = {"2.1": "", "1.5": ":sd15"}
TRAINED = {"lora_base": ":lora_base", "all": ""}
CHIPS = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1", "v5e:16x16")
Case = tuple[str, str, str, str, int]  # topology, version, what is trained, config.remat, images on each chip
CASES: list[Case] = list(itertools.product(CHIPS, MODELS, TRAINED, ["elementwise"], [4]))
CASES.insert(CASES.index(("v5e:2x2", "2.1", "all", "elementwise", 4)) + 1, ("v5e:2x2", "2.1", "all", "gathers", 4))
# config.remat, and where to begin to look for how many images a chip holds, all of 2.1 being trained.
SEARCHED = {"gathers": 16, "blocks": 32}
SHARING = ("v5e:2x2", "v5e:4x4", "v5e:16x16")
SIZES = [2**k for k in range(8)]
HEADER = ["Stable Diffusion", "trained", "chips", "remat", "batch", "HBM of a chip, GiB", "arguments", "temporaries"]
HEADER += ["TFLOP of a chip", "HBM traffic, GB", "bound by", "images/s per chip at most", "one operation after another"]
HEADER += ["chip-hours for 20,000 steps"]
BATCHES = ["remat", "images of a chip"]


def main() -> None:
    only = next((given.removeprefix("--only=") for given in sys.argv[1:]), "")
    failed: dict[Case, str] = {}
    write(failed)
    while (case := next((x for x in unknown() if name(x).startswith(only) and x not in failed), None)) is not None:
        try:
            ask(case)
        except RuntimeError as error:
            failed[case] = f"failed: {error}"
            print(name(case), error, file=sys.stderr)
        write(failed)


def unknown() -> Iterator[Case]:
    yield from (case for case in CASES if not file(case).exists())
    for topology, remat in itertools.product(SHARING, SEARCHED):
        fit = {n: read(case)["fits"] for n in SIZES if file(case := searched(topology, remat, n)).exists()}
        fits, too_many = max((n for n in fit if fit[n]), default=0), min((n for n in fit if not fit[n]), default=0)
        if too_many != (2 * fits or 1):
            images = max(2 * fits, SEARCHED[remat]) if not too_many else 2 * fits or too_many // 2
            if images in SIZES:
                yield searched(topology, remat, images)


def searched(topology: str, remat: str, images: int) -> Case:
    return (topology, "2.1", "all", remat, images)


def name(case: Case) -> str:
    return "_".join(map(str, case)).replace(":", "_")


def file(case: Case) -> Path:
    return RESULTS / "plan" / f"{name(case)}.json"


def read(case: Case) -> dict[str, Any]:
    return json.loads(file(case).read_text())


def command(topology: str, config: str, batch: str, remat: str) -> list[str]:
    file = f"configs/text_to_image.py:diff2flow{config}:array_record:PREPARED"
    program = ["python", "-m", "d2f_jax.plan", f"--config={file}"]
    return [*program, f"--topology={topology}", f"--batch_size={batch}", f"--config.remat={remat}", "--quick", "--json"]


def ask(case: Case) -> None:
    topology, version, trained, remat, images = case
    batch = images * math.prod(map(int, topology.partition(":")[2].split("x")))
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
    plans = {case: read(case) for case in CASES if file(case).exists()}
    rows = [row(case, plans.get(case), failed.get(case, "")) for case in CASES if case in plans or case in failed]
    versions = sorted({f"{k} {v}" for plan in plans.values() for k, v in plan["versions"].items()})
    title = "What finetuning Stable Diffusion 1.5 and 2.1 at 512 pixels needs of TPUs, as their compiler has it."
    line = " ".join(command("CHIPS", "[:sd15][:lora_base]", "BATCH", "REMAT"))
    left, told = len(CASES) - len(rows), ", ".join(versions)
    told += f"; of {len(CASES)} rows {left} were not asked yet" if left else ""
    text = f"{title}\n\n    {line}\n\n{told}\n\n{report.markdown_table(HEADER, rows)}"
    if batches := [cells for remat in SEARCHED for cells in largest(remat)]:
        told = "All of Stable Diffusion 2.1 on v5e, batches of powers of two, as far as they were asked about. Where "
        told += "memory is short the compiler computes again what it thinks best, and one mesh says little of another."
        text += f"\n## The largest batch of a chip\n\n{told}\n\n{report.markdown_table([*BATCHES, *SHARING], batches)}"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "plan.md").write_text(text)


def row(case: Case, plan: dict[str, Any] | None, missing: str) -> list[str]:
    topology, version, trained, remat, _ = case
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
    hours = [f"{x:.0f}" if x >= 10 else f"{x:.2g}" for x in (best["chip_hours"], serial["chip_hours"])]
    return [*cells, " to ".join(hours)]


def largest(remat: str) -> list[list[str]]:
    """Rows of the batches that were asked about, with what the compiler estimates."""
    rows = []
    for images in SIZES:
        plans = {x: read(case) for x in SHARING if file(case := searched(x, remat, images)).exists()}
        if plans:
            rows.append([remat, str(images), *(fitting(plans[x], images) if x in plans else "" for x in SHARING)])
    return rows


def fitting(plan: dict[str, Any], images: int) -> str:
    needs, usable = (plan["memory"][part] / 2**30 for part in ("needs", "usable"))
    if not plan["fits"]:
        return f"does not fit, by {needs - usable:.1f} GiB at least"
    speed = plan["times"]["estimated"]["images_per_second_per_chip"]
    return f"{needs:.1f} GiB, {plan['flops'] / images / 1e12:.2f} TFLOP an image, {speed:.1f} images/s"


if __name__ == "__main__":
    main()
