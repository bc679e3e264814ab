"""Files of LoRA as PyTorch's world writes them: diffusers with PEFT, diffusers' training scripts, and kohya's.

A tensor's name is that of a layer, of the UNet or of the text encoder, and of a part: the factor down to the rank, the
one up from it, or kohya's alpha. A kernel gains `alpha / rank` times their product. A layer without an alpha of its own
has the one that diffusers writes into the file's metadata, or else its rank.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from d2f_jax import lora, weights
from d2f_jax.errors import InputError
from d2f_jax.lora import Adapter, Trained

Network = Literal["unet", "text_encoder"]

_PARTS = {
    ".lora_A.weight": "down",  # PEFT's
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",  # what diffusers' scripts make of that for a UNet's attention
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",  # and for a text encoder's
    ".lora_linear_layer.up.weight": "up",
    ".lora_down.weight": "down",  # kohya's
    ".lora_up.weight": "up",
    "_lora.down.weight": "down",  # and of diffusers before 0.22, after its processor's name
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
_METADATA = "lora_adapter_metadata"
_PEFT = "base_model.model."  # before every name in a file that PEFT itself has written
_PEFT_CONFIG = "adapter_config.json"  # beside it
_PEFT_ALPHA = 8.0  # of a LoraConfig that gives none
_KEEP_THE_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal")  # of PEFT's ways to begin
_SHOWN = 8  # of the tensors at fault, in an error


def read(
    file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], networks: Mapping[Network, nnx.State]
) -> dict[Network, Trained]:
    """The adapters of each of `networks`, which are its parameters; `b` bears the scale.

    Raises one InputError that names every tensor that is missing, unexpected or misshapen, and one for metadata that
    cannot be read, or say that the base is another.
    """
    trained: dict[Network, Trained] = {}
    faults: list[str] = []
    rest = dict(tensors)
    by_peft = any(name.startswith(_PEFT) for name in tensors)
    for network, params in networks.items():
        trained[network], more = _read(rest, network, params, _config(file, metadata, network, by_peft=by_peft))
        faults += more
    faults += [f"unexpected {name}" for name in sorted(rest)] if tensors else ["missing every tensor"]
    refuse(file, faults)
    return trained


def refuse(file: Path, faults: list[str]) -> None:
    """Raises InputError if there are any."""
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise InputError(f"{file} does not fit this model: {'; '.join(faults[:_SHOWN])}{more}")


def _names(network: Network, module: str) -> tuple[str, ...]:
    """What a layer is called; newer versions of transformers leave text_model out."""
    flat = module.replace(".", "_")
    if network == "unet":
        attention, _, projection = module.removesuffix(".0").rpartition(".")
        processor = f"{attention}.processor.{projection}"
        return f"unet.{module}", f"lora_unet_{flat}", f"{_PEFT}{module}", processor, f"unet.{processor}"
    whole = f"text_model.{module}"
    names = f"lora_te_text_model_{flat}", f"{_PEFT}{module}", f"{_PEFT}{whole}"
    return f"text_encoder.{module}", f"text_encoder.{whole}", *names


def _read(
    rest: dict[str, np.ndarray], network: Network, params: nnx.State, config: "_Config | None"
) -> tuple[Trained, list[str]]:
    """A network's adapters, taken out of `rest`, and what is wrong with them."""
    trained: Trained = {}
    faults = []
    kernels = {path: x for path, x in lora.flatten(params).items() if path.endswith(".kernel")}
    for path, kernel in kernels.items():
        module = path.removesuffix(".kernel")
        ends = [(name + end, part) for name in _names(network, module) for end, part in _PARTS.items()]
        named = [(part, rest.pop(name)) for name, part in ends if name in rest]
        if not named:
            continue
        parts = dict(named)
        if told := _faults(module, parts, kernel.shape, len(named)):
            faults += told
            continue
        rank = parts["down"].shape[0]
        scale = 1.0 if config is None else config.scale(network, module, rank)
        if "alpha" in parts:
            scale = parts["alpha"].item() / rank
        trained[path] = _adapter(parts["down"], parts["up"], scale)
    return trained, faults


def _faults(module: str, parts: dict[str, np.ndarray], kernel: tuple[int, ...], count: int) -> list[str]:
    if missing := [f"missing {module} {part}" for part in ("down", "up") if part not in parts]:
        return missing
    if count > len(parts):
        return [f"{module} by two names"]
    if parts.get("alpha", np.ones(())).size != 1:
        return [f"misshapen {module} alpha {parts['alpha'].shape}"]
    found = parts["down"].shape, parts["up"].shape
    rank = next(iter(found[0]), 0)
    down, up = (*kernel[:-1], rank), (*(1,) * (len(kernel) - 2), rank, kernel[-1])
    wanted = tuple(weights.swap_layout(("kernel",), np.empty(s, np.bool_), to_torch=True).shape for s in (down, up))
    if found == wanted and rank:
        return []
    return [f"misshapen {module} {found[0]} and {found[1]}, this model makes it {wanted[0]} and {wanted[1]}"]


def _adapter(down: np.ndarray, up: np.ndarray, scale: float) -> Adapter:
    a, b = (weights.swap_layout(("kernel",), x.astype(np.float32), to_torch=False) for x in (down, up))
    return Adapter(jnp.asarray(a), jnp.asarray(b.reshape(-1, b.shape[-1]) * np.float32(scale)))


@dataclasses.dataclass(frozen=True)
class _Config:
    """Of PEFT's LoraConfig, what scales: alphas by pattern of the layer's name, and that of all other layers."""

    patterns: dict[str, float]
    alpha: float
    use_rslora: bool

    def scale(self, network: Network, module: str, rank: int) -> float:
        names = [module, f"text_model.{module}"] if network == "text_encoder" else [module]
        matching = (a for key, a in self.patterns.items() if any(re.match(rf"(.*\.)?({key})$", n) for n in names))
        return next(matching, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _config(file: Path, metadata: Mapping[str, str], network: Network, *, by_peft: bool) -> _Config | None:
    """The network's, where diffusers has written it into the file's metadata, or PEFT beside the file."""
    what = _PEFT_CONFIG if by_peft else _METADATA
    try:
        if by_peft:
            config = json.loads(file.with_name(_PEFT_CONFIG).read_text())
        else:
            told = json.loads(metadata.get(_METADATA) or "{}")
            config = {key.partition(".")[2]: value for key, value in told.items() if key.startswith(f"{network}.")}
        if not config and not by_peft:
            return None
        patterns = {key: float(alpha) for key, alpha in (config.get("alpha_pattern") or {}).items()}
        for key in patterns:
            re.compile(key)
        found = _Config(patterns, float(config.get("lora_alpha", _PEFT_ALPHA)), bool(config.get("use_rslora")))
    except FileNotFoundError as error:
        raise InputError(
            f"{file}: PEFT has written {_PEFT_CONFIG} beside it, which tells its scale; bring it"
        ) from error
    except (AttributeError, OSError, TypeError, ValueError, re.error) as error:
        raise InputError(f"{file}: its {what} cannot be read ({error}); save it again") from error
    if str(beginning := config.get("init_lora_weights", True)).lower() not in _KEEP_THE_BASE:
        raise InputError(
            f"{file}: init_lora_weights={beginning!r} has changed the base, too; convert it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    return found
