"""The TPU's compiler, which runs on any machine, asked what a program needs; what it said is kept on disk."""

import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.errors import JaxRuntimeError
from jax.experimental import topologies

from d2f_jax.chips import TPU, TPUS
from d2f_jax.errors import InputError, SaveError

# For most of its time the compiler looks for better tiles of each convolution. With this it ends the search early, and
# most of that time is saved. At 0.99 two convolutions of Stable Diffusion's had the same estimate of cycles as without
# it, for v6e. A residual block with a transformer has the same memory, traffic and FLOPs at 0.9 as at 0.99, in half the
# time for v5e and a third for v6e, but 10% and 18% more cycles; at 0.5 some of its products have no cycles at all.
_TARGET = "xla_jf_convolution_performance_target"
_USUAL, _QUICK = "0.99", "0.9"
_MEANING = 1  # of what is kept of an answer; to be raised when it changes, so that it is asked for anew
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one generation, as Cloud TPU names them: `v5e:4x8`; perhaps several slices of them."""

    name: str
    slices: int
    tpu: TPU
    shape: tuple[int, ...]
    devices: Sequence[Any]

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def links(self) -> float:
        """The share of its links by which a chip at the end of every side reaches others: one for a side, or two."""
        rings = [side > 2 and side % self.tpu.wraps == 0 for side in self.shape]
        if len(rings) == 3:
            rings = [all(rings)] * 3
        return sum((1 + ring) * (side > 1) for side, ring in zip(self.shape, rings, strict=True)) / self.tpu.links


@dataclasses.dataclass(frozen=True)
class Answer:
    """Of one device, in bytes. A program that does not fit has no text, and of its memory only `needs` is known."""

    seconds: float
    needs: int
    arguments: int
    temporaries: int
    code: int
    hlo: str

    @property
    def fits(self) -> bool:
        return bool(self.hlo)


def prepare() -> None:
    """Lets the TPU's compiler run where there is no TPU; to be called before JAX is used."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    # It looks for the pod it is part of, and complains of finding none.
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # what it says is kept, not programs that cannot run here


def topology(name: str, slices: int = 1) -> Topology:
    """Raises InputError for a generation or a shape that there is not, and if the compiler is not installed."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
    if match is None or match[1] not in TPUS:
        raise InputError(
            f"--topology={name} is unknown; write {', '.join(TPUS)}, and the chips' shape, as in v5e:4x8 or v5p:2x2x1"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("libtpu, the TPU's compiler, is not installed: ./launch/install.sh tpu")
    tpu, shape = TPUS[match[1]], tuple(map(int, match[2].split("x")))
    options: dict[str, Any] = dict(tpu.options) | ({"num_slices": slices} if slices > 1 else {})
    options["chips_per_host_bounds"] = (*(min(side, 2) for side in shape[:2]), 1)
    try:
        devices = topologies.get_topology_desc(name, "tpu", **options).devices
    except RuntimeError as error:
        _check_compiler()
        raise InputError(f"--topology={name}: no shape of {slices} slices ({_line(error)}); give another") from error
    return Topology(name, slices, tpu, shape, devices)


def _check_compiler() -> None:
    """Raises InputError if it does not even know a shape that there is."""
    try:
        topologies.get_topology_desc("v5e:2x2", "tpu")
    except RuntimeError as error:
        raise InputError(
            f"libtpu, the TPU's compiler, is broken or does not go with jax {jax.__version__} ({_line(error)}); "
            "install both anew: ./launch/install.sh tpu"
        ) from error


def ask(lowered: jax.stages.Lowered, where: Topology, cache: Path, quick: bool = False) -> Answer:
    """What the compiler says; from `cache` if it was asked the same before. Raises SaveError.

    If `quick`, cycles are of tiles that it found in a shorter search.
    """
    versions = [importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")]
    flags = [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")]
    asked = [field.name for field in dataclasses.fields(Answer)]
    place = [where.name, where.slices, dict(where.tpu.options)]
    question = json.dumps([_MEANING, asked, place, versions, flags, _options(quick), lowered.as_text()])
    file = cache / f"{hashlib.sha256(question.encode()).hexdigest()[:32]}.json.gz"
    if (answer := _kept(file)) is not None:
        return answer
    print(f"compiling for {where.name}: seconds for tiny-sd, minutes for Stable Diffusion", file=sys.stderr)
    answer = _asked(lowered, quick)
    part = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(answer)).encode()))
        part.replace(file)
    except OSError as error:
        raise SaveError(f"{file} cannot be written ({error.strerror}); let XDG_CACHE_HOME name a folder") from error
    return answer


def compiled(lowered: jax.stages.Lowered, quick: bool = False) -> jax.stages.Compiled:
    """With a shorter search, if the compiler knows how to be told."""
    try:
        return lowered.compile(_options(quick))
    except JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
    return lowered.compile()


def _options(quick: bool) -> dict[str, str | bool]:
    return {_TARGET: _QUICK if quick else _USUAL}


def _kept(file: Path) -> Answer | None:
    """None as well if it is damaged."""
    try:
        return Answer(**json.loads(gzip.decompress(file.read_bytes())))
    except (OSError, EOFError, ValueError, TypeError, zlib.error):
        return None


def _asked(lowered: jax.stages.Lowered, quick: bool) -> Answer:
    began = time.monotonic()
    try:
        program = compiled(lowered, quick)
    except JaxRuntimeError as error:
        needs = _too_much(str(error))
        if needs is None:
            raise
        return Answer(time.monotonic() - began, needs, 0, 0, 0, "")
    memory: Any = program.memory_analysis()
    code = memory.generated_code_size_in_bytes
    laid_out = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    laid_out -= memory.alias_size_in_bytes  # results that take the place of arguments
    return Answer(
        seconds=time.monotonic() - began,
        needs=max(memory.peak_memory_in_bytes, laid_out) + code,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=code,
        hlo=program.as_text() or "",
    )


def _too_much(said: str) -> int | None:
    """The bytes of HBM that a program would need, if that is why it was refused.

    Raises InputError if it is for lack of another memory, such as VMEM, on which the size of the batch hardly bears.
    """
    if "RESOURCE_EXHAUSTED" not in said:
        return None
    found = re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", said)
    found = found or re.search(r"memory required[^(]*\(([\d.]+)([KMGT])\) exceeds available HBM", said)
    if found is None:
        raise InputError(f"the TPU's compiler finds no room in a memory that is not HBM ({_line(said)})")
    return int(float(found[1]) * _UNITS[found[2]])


def _line(error: Exception | str) -> str:
    return " ".join(str(error).split())[:200]
