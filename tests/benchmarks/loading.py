"""Time and memory of loading a Stable Diffusion 2.1 UNet from half-precision files, ours and diffusers'.

    python tests/benchmarks/loading.py

Writes 866M random parameters as diffusers saves them with `variant="fp16"` (1.7 GB) and loads them in fresh processes
that do nothing else. Time is from call to parameters in memory, with the file in the page cache; memory is what the
process holds at its peak beyond what the imports held. diffusers maps float16 files into memory and reads them when
they are used. The record goes to results/benchmarks/loading.json.
"""

import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "results" / "benchmarks"
REPEATS = 3


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "write", folder], check=True, stdout=subprocess.DEVNULL)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        for library, dtype in itertools.product(("d2f_jax", "diffusers"), ("float32", "float16")):
            runs = [measured(library, folder, dtype) for _ in range(REPEATS)]
            seconds = statistics.median(run["seconds"] for run in runs)
            rows.append([library, dtype, seconds, size / seconds, max(run["bytes"] for run in runs)])
            print(rows[-1], flush=True)
    record = {
        "file_bytes": size,
        "rows": rows,
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    record["versions"] = {name: version(name) for name in ("jax", "torch", "diffusers")}
    (RESULTS / "loading.json").write_text(json.dumps(record, indent=1) + "\n")


def measured(library: str, folder: str, dtype: str) -> dict[str, float]:
    command = [sys.executable, __file__, library, folder, dtype]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def write(folder: str) -> None:
    import diffusers

    diffusers.UNet2DConditionModel(
        sample_size=96,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    ).half().save_pretrained(folder, variant="fp16")


def load(library: str, folder: str, dtype: str) -> None:
    if library == "d2f_jax":
        import jax

        from d2f_jax import load_unet

        jax.devices()

        def run():
            return jax.block_until_ready(jax.tree.leaves(load_unet(folder, variant="fp16", param_dtype=dtype)))
    else:
        import diffusers
        import torch

        def run():
            kind = getattr(torch, dtype)
            return diffusers.UNet2DConditionModel.from_pretrained(folder, variant="fp16", torch_dtype=kind)

    held, began = peak(), time.perf_counter()
    model = run()
    print(json.dumps({"seconds": time.perf_counter() - began, "bytes": peak() - held}))
    del model


def peak() -> int:
    """Largest resident size so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main()
        case ["write", folder]:
            write(folder)
        case [library, folder, dtype]:
            load(library, folder, dtype)
