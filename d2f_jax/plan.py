"""What a finetune, or sampling, needs of TPUs, before any is rented; of GPUs it tells nothing.

    ./launch/install.sh tpu
    python -m d2f_jax.plan --config=configs/X.py --topology=v5e:4x8 [--batch_size=N] [--program=sample]
        [--search] [--quick]

The TPU's own compiler compiles the run's own program, on any machine, from shapes alone: no weights and no data are
read. A table is printed, or with --json an object on stdout and the table on stderr. What the compiler said is kept in
~/.cache/d2f_jax/plans. A model's config files are read from its folder or the hub, and known here for Stable Diffusion
1.5 and 2.1. Examples have the arrays of the first of config.data.sources, or what is usual for its kind if it is not
here. --search compiles batches of powers of two a device for each config.remat, and tells the largest that fit. With
--quick the compiler looks less long for good tiles, which takes half the time or less. Only the estimate by cycles is
another then: 10% and 18% more for a part of Stable Diffusion on v5e and v6e.

Memory is as the compiler lays it out. Times are bounds of what it made of the program: FLOPs at the chip's bfloat16
peak, for TPUs multiply float32 in bfloat16 too; bytes of HBM that operations read and write, at its full bandwidth;
bytes that collectives bring in, over all of a chip's links at once, which no way to do them exceeds and few reach. "At
least" is the longest of the three. Nothing overlaps in "one operation after another", where each takes as long as its
FLOPs or its bytes. Of fused attention FLOPs are those of its kernels' products, by their shapes, and bytes those of its
operands, once. "As the compiler estimates" is the same with the cycles by which the compiler chooses between ways to do
an operation, where it gives any: none for fused attention and collectives. Cycles are turned into seconds by one number
for each generation of chips, with which a large product of matrices runs at the peak. They know of operations that are
too small or of an awkward shape, but are made for comparing, and this time was not held against a TPU's. None knows
latency between chips, networks between slices, of whose traffic only the bytes are told, or a host late with data.
"""

import json
import math
import sys
from collections.abc import Callable
from typing import get_args

from absl import flags
from ml_collections import config_flags

from d2f_jax import forecast, oracle, program, report
from d2f_jax.errors import InputError
from d2f_jax.forecast import Kind, Plan
from d2f_jax.models.unet import Remat
from d2f_jax.oracle import Topology
from d2f_jax.program import Config

_SIZE = {"train": "train.batch_size", "sample": "eval.batch_size"}


def main() -> None:
    given = flags.FLAGS
    if given.config is None or given.topology is None:
        raise InputError("--config=configs/NAME.py and --topology=v5e:4x8 are both needed")
    where, config = oracle.topology(given.topology, given.slices), given.config
    if given.batch_size is not None:
        config = _changed(config, {_SIZE[given.program]: given.batch_size})
    if given.search:
        plans = search(config, given.program, where, given.quick)
        text, content = choices(plans, where), [plan.as_dict() for plan in plans]
    else:
        plan = forecast.make_plan(config, given.program, where, given.quick)
        text, content = forecast.table(plan), plan.as_dict()
    print(text, file=sys.stderr if given.json else sys.stdout)
    if given.json:
        print(json.dumps(content, indent=2))


def search(config: Config, kind: Kind, where: Topology, quick: bool = False) -> list[Plan]:
    """Of every kind of recomputation the largest batch that fits, the fastest as the compiler estimates first.

    Batches are powers of two for each device, and each of the parts of a step. Raises InputError if none fits.
    """
    train = kind == "train"
    parts = len(where.devices) * (config.train.accumulate if train else 1)
    wanted = (config.train if train else config.eval).batch_size
    start, found = 2 ** int(math.log2(max(1, wanted // parts))), []
    for remat in get_args(Remat) if train else ("none",):

        def make(size: int, remat: str = remat) -> Plan:
            changed = _changed(config, {_SIZE[kind]: size * parts, "remat": remat})
            plan = forecast.make_plan(changed, kind, where, quick)
            print(f"remat {remat}, {size} images a device: {forecast.verdict(plan)}", file=sys.stderr)
            return plan

        found += largest(make, start)
    if not found:
        raise InputError(
            f"not one image a device fits {where.name}; take larger chips, or more of them, or have more of them share "
            "a copy of the parameters (config.mesh.fsdp)"
        )
    return sorted(found, key=lambda plan: plan.seconds["estimated"] / plan.batch_size)


def largest(make: Callable[[int], Plan], start: int) -> list[Plan]:
    """The plan of the largest power of two that fits, if one does; memory is taken to grow with the batch."""
    best, fits, too_large, size = None, 0, math.inf, start
    while size > fits:
        plan = make(size)
        if plan.fits:
            best, fits = plan, size
            memory = plan.memory
            room = memory["usable"] - memory["needs"] + memory["temporaries"]
            expected = 2 ** int(math.log2(max(1, room / max(memory["temporaries"], 1))))
            size = int(min(size * min(max(expected, 2), 8), too_large // 2))
        else:
            too_large = size
            size = size // 2 if best is None else max(fits, size // 2)
    return [] if best is None else [best]


def choices(plans: list[Plan], where: Topology) -> str:
    """Markdown: what fits, and all of the first with its flags."""
    rows, first = [], plans[0]
    for plan in plans:
        times = plan.times()["estimated"]
        told = [f"{plan.memory['needs'] / 2**30:.2f}", f"{times['images_per_second_per_chip']:.3g}"]
        rows.append([plan.remat, str(plan.batch_size), *told])
    header = [
        "remat",
        "largest batch",
        f"GiB of {where.tpu.usable_gib}",
        "images/s per chip, as the compiler estimates",
    ]
    chosen = f"--batch_size={first.batch_size}" + (f" --config.remat={first.remat}" if first.program == "train" else "")
    return f"{report.markdown_table(header, rows)}\n{chosen}\n\n{forecast.table(first)}"


def _changed(config: Config, values: dict[str, int | str]) -> Config:
    copy = config.copy_and_resolve_references()
    copy.update_from_flattened_dict(values)
    return copy


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The run: a file of configs/, as for d2f_jax.train.")
    flags.DEFINE_string("topology", None, "Generation and shape of the chips, as Cloud TPU names them: v5e:4x8.")
    flags.DEFINE_integer("slices", 1, "How many of them, joined by the data centre's network.", lower_bound=1)
    flags.DEFINE_integer("batch_size", None, "Images over all chips; the config's if not given.", lower_bound=1)
    flags.DEFINE_enum("program", "train", get_args(Kind), "train: a step. sample: a batch of config.eval's pictures.")
    flags.DEFINE_bool("json", False, "Print JSON, and the table on stderr.")
    flags.DEFINE_bool("search", False, "Find the largest batch that fits, for each config.remat.")
    flags.DEFINE_bool("quick", False, "Half the time or less, for an estimate by cycles of worse tiles.")
    oracle.prepare()
    program.run(main)
