"""Adapters as files: our own, which holds all that was trained, and those that PyTorch's world loads and writes.

`save` writes one safetensors file whose metadata says what was trained and at which scale. `export` writes LoRA as
diffusers (PEFT's names) or kohya's scripts name it: the scale is folded into B, and all ranks of a file are filled up
with zeros to the largest, since diffusers reads files of mixed ranks at wrong scales (with kohya's alphas, and before
its pull request 14409 without them). The change of a fully trained convolution is a LoRA too, exactly, of rank at most
min(O, I * H * W); that of a bias or a norm is none, and goes into a file of its own beside the first, which names it.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from d2f_jax import lora, lora_foreign, weights
from d2f_jax.alignment import ALIGNED, Alignment
from d2f_jax.errors import InputError
from d2f_jax.lora import Adapter, Conditional, Targets, Trained
from d2f_jax.task import TEXT_TO_IMAGE, Task

Layout = Literal["peft", "kohya"]

_FORMAT = "d2f_jax.lora"
_BESIDE = "biases_and_norms"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What `lora.merge` takes: of the UNet, and of the text encoder where that was trained as well."""

    trained: Trained
    scale: float
    text_encoder: Trained = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Learned:
    """What a run's adapters learned, and on what: with `zero_terminal_snr` the noise schedule ended in pure noise."""

    task: Task = TEXT_TO_IMAGE
    alignment: Alignment = ALIGNED
    zero_terminal_snr: bool = False


_USUAL = Learned()


def save(
    file: str | Path,
    trained: Trained,
    targets: Targets,
    *,
    scale: float,
    how: Learned = _USUAL,
) -> None:
    """All that is trained, adapters and whole layers, in our names and layout; `load` reads it back bit for bit.

    `learned` reads back `how`.
    """
    metadata = {"format": _FORMAT, "scale": repr(float(scale)), "targets": json.dumps(dataclasses.asdict(targets))}
    metadata |= _told(how)
    _write(Path(file), {name: np.asarray(x) for name, x in _flat(trained).items()}, metadata)


def load(file: str | Path, params: nnx.State, text_encoder: nnx.State | None = None) -> Loaded:
    """Adapters of a UNet with `params`, from what `save` or `export`, PEFT, diffusers or kohya's scripts have written.

    With a file of `export` the one beside it is read as well, if it names one. Those of PyTorch's world may hold
    adapters of the `text_encoder`, whose parameters have to be given then. Raises InputError for a file that is
    damaged, and one that names every tensor that is missing, unexpected, or of another shape than this model asks for.
    """
    file = Path(file)
    with _opened(file) as handle:
        metadata = handle.metadata() or {}
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    if metadata.get("format") == _FORMAT:
        return _own(file, tensors, metadata, params)
    networks: dict[lora_foreign.Network, nnx.State] = {"unet": params}
    if text_encoder is not None:
        networks["text_encoder"] = text_encoder
    trained = lora_foreign.read(file, tensors, metadata, networks)
    unet = trained["unet"]
    if _BESIDE in metadata:
        unet |= _beside(file, metadata[_BESIDE], params)
    return Loaded(unet, 1.0, trained.get("text_encoder", {}))


def learned(file: str | Path) -> Learned | None:
    """What a file of `save` or `export` says that its adapters learned, and how; others do not tell.

    A file that was written before it told of the schedule counts as one without zero terminal SNR. Raises InputError as
    `load`.
    """
    file = Path(file)
    with _opened(file) as handle:
        metadata = handle.metadata() or {}
    if metadata.get("format") != _FORMAT and "alignment" not in metadata:
        return None
    try:
        return Learned(
            Task(**json.loads(metadata["task"])),
            Alignment(**json.loads(metadata["alignment"])),
            bool(json.loads(metadata.get("zero_terminal_snr", "false"))),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _unclear(file, error) from error


def export(
    file: str | Path,
    trained: Trained,
    params: nnx.State,
    *,
    scale: float,
    layout: Layout = "peft",
    how: Learned | None = None,
) -> Path | None:
    """Writes what is a LoRA for diffusers' `pipe.load_lora_weights(FILE)`, on the base `params`.

    What is none, fully trained biases and norms, goes beside it, and has to be put in place first:
    `pipe.unet.load_state_dict(load_file(...), strict=False)`. Returns that file, or None if there is nothing of the
    kind. `how`, which diffusers does not ask for, `learned` reads back. Raises InputError for conditional adapters,
    which neither format knows.
    """
    file, base = Path(file), lora.flatten(params)
    pairs, rest = {}, {}
    for path, entry in sorted(trained.items()):
        module, leaf = path.rsplit(".", 1)
        if isinstance(entry, Conditional):
            raise InputError(f"the adapter of {path} depends on a condition, which no LoRA file can hold; use save")
        if isinstance(entry, Adapter):
            pairs[module] = np.asarray(entry.a), np.asarray(entry.b) * np.float32(scale)
        elif leaf == "kernel":
            pairs[module] = _factors(np.asarray(entry) - np.asarray(base[path]))
        else:
            rest[weights.key_of(tuple(path.split(".")))] = np.asarray(entry)
    if not pairs:
        raise InputError("no kernel is trained, so there is no LoRA to export")
    rank = max(b.shape[0] for _, b in pairs.values())
    tensors = {}
    for module, (a, b) in pairs.items():
        missing = rank - b.shape[0]
        a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)])
        b = np.pad(b, [(0, missing), (0, 0)]).reshape(*(1,) * (a.ndim - 2), rank, -1)
        down, up = _names(module, layout)
        tensors[down], tensors[up] = _torch(a), _torch(b)
        if layout == "kohya":
            tensors[_alpha(down)] = np.float32(rank)
    beside = file.with_name(f"{file.stem}.{_BESIDE}.safetensors")
    metadata = {"format": "pt"} | ({} if how is None else _told(how))
    if rest:
        _write(beside, rest, {"format": "pt"})
    else:
        beside.unlink(missing_ok=True)
    _write(file, tensors, metadata | ({_BESIDE: beside.name} if rest else {}))
    return beside if rest else None


def _told(how: Learned) -> dict[str, str]:
    return {
        "task": json.dumps(dataclasses.asdict(how.task)),
        "alignment": json.dumps(dataclasses.asdict(how.alignment)),
        "zero_terminal_snr": json.dumps(how.zero_terminal_snr),
    }


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(file, framework="numpy") as handle:
            yield handle
    except FileNotFoundError as error:
        raise InputError(f"{file} is missing; give a file of adapters") from error
    except (OSError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(f"{file} is no safetensors file that can be read ({error}); copy it again") from error


def _unclear(file: Path, error: Exception) -> InputError:
    return InputError(f"{file} does not say what it holds ({error}); it is damaged or of another version")


def _own(file: Path, tensors: dict[str, Any], metadata: dict[str, str], params: nnx.State) -> Loaded:
    try:
        targets, scale = Targets(**json.loads(metadata["targets"])), float(metadata["scale"])
    except (KeyError, TypeError, ValueError) as error:
        raise _unclear(file, error) from error
    try:
        like = jax.eval_shape(lambda params: lora.init(params, jax.random.key(0), targets), params)
    except InputError as error:
        raise InputError(f"{file} does not fit this model: {error}") from error
    wanted = _flat(like)
    faults = [f"missing {name}" for name in sorted(wanted.keys() - tensors.keys())]
    faults += [f"unexpected {name}" for name in sorted(tensors.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & tensors.keys()):
        if tensors[name].shape != wanted[name].shape:
            faults.append(f"misshapen {name} {tensors[name].shape}, this model makes it {wanted[name].shape}")
    lora_foreign.refuse(file, faults)
    flat = {name: jnp.asarray(x) for name, x in tensors.items()}
    return Loaded({path: _entry(path, entry, flat) for path, entry in like.items()}, scale)


def _beside(file: Path, name: str, params: nnx.State) -> Trained:
    """What was trained fully and is no LoRA, from the file that `file` names."""
    if not (beside := file.with_name(name)).exists():
        raise InputError(f"{beside} is missing, the biases and norms that were trained with {file.name}; copy it, too")
    with _opened(beside) as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    known = {weights.key_of(tuple(path.split("."))): (path, x.shape) for path, x in lora.flatten(params).items()}
    faults = [f"unexpected {key}" for key in sorted(tensors.keys() - known.keys())]
    for key in sorted(tensors.keys() & known.keys()):
        if tensors[key].shape != known[key][1]:
            faults.append(f"misshapen {key} {tensors[key].shape}, this model makes it {known[key][1]}")
    lora_foreign.refuse(beside, faults)
    return {known[key][0]: jnp.asarray(x) for key, x in tensors.items()}


def _flat(trained: Trained) -> dict[str, Any]:
    """Arrays by name: `PATH.a`, `PATH.b` and so on of an adapter, `PATH` of what is trained fully."""
    flat = {}
    for path, entry in trained.items():
        if isinstance(entry, Adapter):
            flat |= {f"{path}.{f.name}": getattr(entry, f.name) for f in dataclasses.fields(entry)}
        else:
            flat[path] = entry
    return flat


def _entry(path: str, like: Any, flat: dict[str, Any]) -> Any:
    if not isinstance(like, Adapter):
        return flat[path]
    return type(like)(**{f.name: flat[f"{path}.{f.name}"] for f in dataclasses.fields(like)})


def _factors(delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[..., I, O] as a product of two, exactly: one of them is the identity."""
    inner, outputs = math.prod(delta.shape[:-1]), delta.shape[-1]
    if outputs <= inner:
        return delta, np.eye(outputs, dtype=delta.dtype)
    return np.eye(inner, dtype=delta.dtype).reshape(*delta.shape[:-1], inner), delta.reshape(inner, outputs)


def _names(module: str, layout: Layout) -> tuple[str, str]:
    if layout == "peft":
        return f"unet.{module}.lora_A.weight", f"unet.{module}.lora_B.weight"
    flat = f"lora_unet_{module.replace('.', '_')}"
    return f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"


def _alpha(down: str) -> str:
    return down.replace(".lora_down.weight", ".alpha")


def _torch(kernel: np.ndarray) -> np.ndarray:
    return weights.swap_layout(("kernel",), kernel, to_torch=True)


def _write(file: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """Appears under its name only when it is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    safetensors.numpy.save_file(
        {name: np.asarray(x, order="C") for name, x in tensors.items()}, part, metadata=metadata
    )
    os.replace(part, file)
