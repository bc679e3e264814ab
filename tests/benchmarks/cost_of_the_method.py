"""What Diff2Flow costs above the diffusion objective: operations of Stable Diffusion 2.1's train step.

    PYTHONPATH=. python tests/benchmarks/cost_of_the_method.py

At 512 pixels, batch 1, before XLA optimises: the alignment is a few numbers a picture, and a few operations on a
latent. How long a step takes is measured by the study on tiny-sd (`./launch/study.sh`, section Cost). The record goes
to results/benchmarks/cost_of_the_method.json.
"""

import json
import time
from pathlib import Path

import jax

from configs import text_to_image
from d2f_jax import blueprint

ROOT = Path(__file__).parents[2]


def main() -> None:
    counted = {}
    for objective in text_to_image.OBJECTIVES:
        config = text_to_image.get_config(f"{objective}:array_record:PREPARED")
        config.train.batch_size = 1
        counted[objective] = blueprint.useful_flops(config, blueprint.load(config))
        print(f"{objective}: {counted[objective]:.0f} FLOPs", flush=True)
    record = {"flops": counted, "jax": jax.__version__, "date": time.strftime("%Y-%m-%d", time.gmtime())}
    file = ROOT / "results" / "benchmarks" / "cost_of_the_method.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
