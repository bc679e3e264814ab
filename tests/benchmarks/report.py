"""results/benchmarks.md, from the records that the benchmarks have left in results/benchmarks/.

    ./launch/install.sh torch study
    for what in against_pytorch convolutions cost_of_the_method lora_forms startup loading input_pipeline growth report
    do PYTHONPATH=. .venv/bin/python tests/benchmarks/$what.py; done

Hours on a CPU; each script says at its head what it measures. `attention.py` leaves a record on a GPU, and
`block_on_tpu.py v6e:2x2` one where `./launch/install.sh tpu` was run.
"""

import json
import statistics
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from d2f_jax import report

RESULTS = Path(__file__).parents[2] / "results"
WORK = {
    "train": "train step",
    "gradient": "loss and gradient",
    "sample": "pictures in {steps} steps",
}


def main() -> None:
    records = RESULTS / "benchmarks"
    parts = [HEAD]
    parts += [against(json.loads(file.read_text())) for file in sorted(records.glob("against_pytorch_*.json"))]
    parts += [attention(json.loads(file.read_text())) for file in sorted(records.glob("attention_*.json"))]
    if (file := records / "convolutions_cpu.json").exists():
        parts.append(convolutions(json.loads(file.read_text())))
    if not list(records.glob("against_pytorch_nvidia*.json")):
        parts.append("## On a GPU\n\nNot measured yet: `tests/benchmarks/against_pytorch.py` measures what it finds.\n")
    if (file := records / "cost_of_the_method.json").exists():
        parts.append(cost(json.loads(file.read_text())))
    parts += [lora_forms(json.loads(file.read_text())) for file in sorted(records.glob("lora_forms_*.json"))]
    parts += [startup(json.loads(file.read_text())) for file in sorted(records.glob("startup_*.json"))]
    parts += [
        of(json.loads(file.read_text())) for name, of in ONES.items() if (file := records / f"{name}.json").exists()
    ]
    parts += [growth(file) for file in sorted(records.glob("growth_*.json"))]
    (RESULTS / "benchmarks.md").write_text("\n".join(parts))


HEAD = """# Benchmarks

Written by `tests/benchmarks/report.py` from the records of the other scripts there, each of which says at its head what
it does and how. Ratios are of one run on one machine; over 1, ours is faster. On a CPU peak memory is the whole
process's, loading and compiling included.
"""


def against(record: dict[str, Any]) -> str:
    where = told(record["device"])
    gpu = record["device"]["platform"] == "gpu"
    rows = []
    for case in record["cases"].values():
        rows += [row(case, name, on_gpu=gpu) for name in case["seconds"]]
    versions: dict[str, str] = {}
    for case in record["cases"].values():
        for facts in case["facts"].values():
            versions |= facts.get("versions", {})
    stated = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    header = ["", "batch", "latents", "by", "seconds", "images/s", "how fast ours is to it", "peak memory"]
    header += ["MFU of the measured rate"] if gpu else []
    return f"""## Against PyTorch diffusers: {where}

{record["date"]}, {stated}; {record["device"]["flops_per_second"] / 1e12:.3g} TFLOP/s in a product of large matrices.

{textwrap.fill(record.get("note", ""), 120) if gpu else KERNELS}

{report.markdown_table(header, rows)}"""


KERNELS = """On CPUs XLA leaves convolutions and products to YNNPACK. "XLA's own kernels" are those of the same program
under `XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=`."""


def row(case: dict[str, Any], name: str, *, on_gpu: bool) -> list[str]:
    seconds, facts = case["seconds"][name], case["facts"][name]
    what = WORK[case["work"]].format(**case)
    cells = [f"{case['model']}, {what}", str(case["batch"]), f"{case['side']} x {case['side']}", name]
    if isinstance(seconds, str):
        return [*cells, seconds, "", "", "", *([""] if on_gpu else [])]
    mine = case["seconds"]["ours"]
    ratio = "1"
    if name != "ours" and not isinstance(mine, str):
        if case["together"]:
            times = statistics.median(t / o for o, t in zip(mine, seconds, strict=True))
        else:
            times = statistics.median(seconds) / statistics.median(mine)
        ratio = f"{times:.2f}"
    median = statistics.median(seconds)
    cells += [f"{median:.3g}", f"{case['batch'] / median:.3g}", ratio, f"{facts['peak_bytes'] / 1e9:.2f} GB"]
    if on_gpu:
        flops = case["facts"]["ours"].get("flops")
        cells += [f"{flops / median / facts['product']:.0%}" if flops else ""]
    return cells


def attention(record: dict[str, Any]) -> str:
    rows = []
    for of in record["rows"]:
        shape = f"{of['queries']} queries, {of['keys']} keys, {of['heads']} heads of {of['features']}"
        times = [f"{1e6 * of[backend][i]:,.0f}" for i in (0, 1) for backend in ("xla", "cudnn")]
        rows.append([shape, *times, f"{max(of['differ']):.1e}"])
    header = ["", "value: XLA", "cuDNN", "gradient: XLA", "cuDNN", "differ by"]
    return f"""## Attention alone: {record["device"]}

Microseconds at batch {record["batch"]} in bfloat16, and the largest relative difference of value and gradients; jax
{record["jax"]}, {record["date"]}. cuDNN's is chosen from 256 queries on.

{report.markdown_table(header, rows)}"""


def convolutions(record: dict[str, Any]) -> str:
    rows = []
    for of in record["rows"]:
        batch, side, inputs, outputs = of["shape"]
        rates = [" / ".join(f"{rate:.0f}" for rate in each) for each in of["gflops"].values()]
        rows.append([f"{batch} x {side} x {side}, {inputs} to {outputs} channels", *rates])
    table = report.markdown_table(["3 x 3 convolution", *record["rows"][0]["gflops"]], rows)
    ours, theirs = record["product"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"""## Convolutions alone, on a CPU: {record["device"]}

GFLOP/s of ours / XLA's / PyTorch's; {versions}, {record["date"]}. A product of large matrices has {ours:.0f} in XLA and
{theirs:.0f} in PyTorch. Where the kernel is larger than the picture, ours is a product of matrices, elsewhere XLA's.

{table}"""


def cost(record: dict[str, Any]) -> str:
    base = record["flops"]["diffusion"]
    rows = [[name, f"{n / 1e12:.4f}", f"{n / base:.9f}"] for name, n in record["flops"].items()]
    table = report.markdown_table(["objective", "TFLOP a picture", "to diffusion"], rows)
    return f"""## Cost of the method

Operations of a train step of Stable Diffusion 2.1 at 512 pixels and batch 1, optimizer included, before XLA optimises;
jax {record["jax"]}, {record["date"]}. What a step of tiny-sd takes is in [study.md](study.md#cost).

{table}"""


def lora_forms(record: dict[str, Any]) -> str:
    on_cpu = record["device"].startswith("cpu")
    at = "At a quarter of its width and 32 x 32 latents" if on_cpu else "At 512 pixels"
    measured = {
        "size": "At 512 pixels, operations before XLA optimises",
        "time": f"{at}, temporaries and time",
        "tpu": "A residual block and a transformer by the compiler for TPU v6e, batch 4, bfloat16, remat elementwise",
    }
    cells: dict[str, dict[str, Callable[[dict[str, Any]], str]]] = {
        "size": {"TFLOP": lambda row: f"{row['flops'] / 1e12:.2f}"},
        "time": {
            "MB": lambda row: f"{row['temporaries'] / 1e6:,.0f}",
            "CPU s" if on_cpu else "s": lambda row: f"{row['seconds']:.2f}" if on_cpu else f"{row['seconds']:.3g}",
        },
        "tpu": {
            "MiB": lambda row: f"{row['temporaries'] / 2**20:.0f}",
            "GB of HBM": lambda row: f"{row['hbm'] / 1e9:.2f}",
            "GFLOP": lambda row: f"{row['flops'] / 1e9:.0f}",
        },
    }
    parts = [
        f"""## LoRA merged into the kernels, or beside the layers: {record["device"]}

Loss and gradient of Stable Diffusion 2.1's UNet in float32. Why training merges is told at the head of
[lora_forms.py](../tests/benchmarks/lora_forms.py).
"""
    ]
    for part, what in measured.items():
        if part in record:
            parts.append(f"{what}; jax {record[part]['jax']}, {record[part]['date']}.\n")
            parts.append(beside(record[part]["rows"], "width" if part == "tpu" else "batch", cells[part]))
    return "\n".join(parts)


def beside(found: list[dict[str, Any]], key: str, cells: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    """A row for each way to train, and in it cells for each `key`, as batch."""
    sizes = sorted({row[key] for row in found})
    rows: dict[tuple[str, str], list[str]] = {(row["preset"], row["form"]): [] for row in found}
    known = {(row["preset"], row["form"], row[key]): [cell(row) for cell in cells.values()] for row in found}
    for name, told_of in rows.items():
        for size in sizes:
            told_of += known.get((*name, size), [""] * len(cells))
    header = ["trained", "adapters", *(f"{name} at {key} {size}" for size in sizes for name in cells)]
    return report.markdown_table(header, [[p or "all", form if p else "", *row] for (p, form), row in rows.items()])


def startup(record: dict[str, Any]) -> str:
    rows = [[kind, f"{seconds:.1f}"] for kind, seconds in record["seconds"].items()]
    table = report.markdown_table(["cache of compiled programs", "seconds"], rows)
    return f"""## From the start of a process to its first step: {told(record["device"])}

The quickstart's training, {record["date"]}.

{table}"""


def growth(file: Path) -> str:
    record = json.loads(file.read_text())
    return f"""## How cost grows: {record["device"]}

tiny-sd, {record["date"]}, jax {record["jax"]}.

![Time and memory by batch, resolution and devices](benchmarks/{file.stem}.png)
"""


def loading(record: dict[str, Any]) -> str:
    rows = [
        [library, dtype, f"{seconds:.1f}", f"{rate / 1e9:.2f}", f"{held / 1e9:.1f} GB"]
        for library, dtype, seconds, rate, held in record["rows"]
    ]
    table = report.markdown_table(["loaded by", "as", "seconds", "GB/s of file", "peak memory"], rows)
    return f"""## Loading the UNet of Stable Diffusion 2.1

From a file of {record["file_bytes"] / 1e9:.2f} GB in half precision, in the page cache. diffusers maps what it need not
convert, and reads it when it is used. {facts(record)}.

{table}"""


def input_pipeline(record: dict[str, Any]) -> str:
    rows = [[name, str(size), *(f"{rate:,.0f}" for rate in rates)] for name, size, *rates in record["rows"]]
    table = report.markdown_table(["source", "pixels", *(f"{n} workers" for n in record["workers"])], rows)
    return f"""## Examples per second from the loader

Decoded, cropped and tokenised, by source and `config.data.num_workers`; nothing uses them.
{facts(record)}.

{table}"""


def block_on_tpu(record: dict[str, Any]) -> str:
    rows = [
        [
            of["attention"],
            of["recomputed"],
            f"{of['temporaries'] / 2**20:.0f} MiB",
            f"{of['hbm'] / 1e9:.2f} GB",
            f"{of['flops'] / 1e9:.0f}",
        ]
        for of in record["rows"]
    ]
    table = report.markdown_table(["attention", "recomputed", "temporaries", "HBM traffic", "GFLOP"], rows)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"""## A residual block and a transformer on a TPU, by its compiler: {record["topology"].partition(":")[0]}

The gradient at Stable Diffusion 2.1's finest level at 512 pixels, batch 4, bfloat16, one chip; nothing was run. GFLOP
are those of products, the fused kernels' among them. {versions}, {record["date"]}.

{table}"""


ONES = {"loading": loading, "input_pipeline": input_pipeline, "block_on_tpu": block_on_tpu}
"""By the name of the record."""


def facts(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{record['cores']} CPU cores, {versions}, {record['date']}"


def told(device: dict[str, Any]) -> str:
    return f"{device['kind']}, {device['cores']} CPU cores"


if __name__ == "__main__":
    main()
