"""Time and memory of loading a Stable Diffusion 2.1 UNet from half-precision files, ours and diffusers'.

    python tests/benchmarks/loading.py

Writes 866M random parameters as diffusers saves them with `variant="fp16"` (1.7 GB) and loads them in fresh processes
that do nothing else. Time is from call to parameters in memory, with the file in the page cache; memory is what the
process holds at its peak beyond what the imports held.

On two cores of an AMD EPYC, 2026-11-25, jax 0.10.2, torch 2.13.0, diffusers 0.42.1 (which maps float16 files into
memory and reads them when they are used):

    loaded by   as        seconds   GB/s of file   peak memory
    d2f_jax     float32   9.5       0.18           5.4 GB
    d2f_jax     float16   6.2       0.28           3.5 GB
    diffusers   float32   2.2       0.79           5.3 GB
    diffusers   float16   1.6       1.06           0.1 GB
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPEATS = 3


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "write", folder], check=True, stdout=subprocess.DEVNULL)
        size = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e9
        print(
            f"file: {size:.2f} GB\n\n| loaded by | as | seconds | GB/s of file | peak memory |\n|---|---|---|---|---|"
        )
        for library, dtype in [
            ("d2f_jax", "float32"),
            ("d2f_jax", "float16"),
            ("diffusers", "float32"),
            ("diffusers", "float16"),
        ]:
            runs = [measured(library, folder, dtype) for _ in range(REPEATS)]
            seconds = sorted(run["seconds"] for run in runs)[REPEATS // 2]
            memory = max(run["bytes"] for run in runs) / 1e9
            print(f"| {library} | {dtype} | {seconds:.1f} | {size / seconds:.2f} | {memory:.1f} GB |", flush=True)


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
