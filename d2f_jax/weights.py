"""Checkpoints in diffusers' layout: loading, saving, and the one rule between their names and ours.

Modules are named after the checkpoint's keys, so a parameter's key is its path with `kernel`, `scale` and `embedding`
called `weight`, and batch norm's statistics as PyTorch calls them; its array is transposed by rank: convolutions
HWIO <-> OIHW, linear layers IO <-> OI. The rule runs in both directions and is strict.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
from jax.typing import DTypeLike

from d2f_jax.errors import InputError
from d2f_jax.models.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel
from d2f_jax.models.layers import shapes_of
from d2f_jax.models.taesd import AutoencoderTiny, TinyConfig
from d2f_jax.models.unet import UNet2DConditionModel, UNetConfig
from d2f_jax.models.vae import AutoencoderKL, VAEConfig

if TYPE_CHECKING:
    from transformers import CLIPTokenizer  # an import takes a second and more

TINY_SD = Path(__file__).parent / "assets" / "tiny-sd"
"""The embedded model, which the name "tiny-sd" stands for."""

Model = TypeVar("Model", bound=nnx.Module)
Autoencoder = AutoencoderKL | AutoencoderTiny
_DIFFUSERS, _TRANSFORMERS = "diffusion_pytorch_model", "model"
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "mean": "running_mean", "var": "running_var"}
# Tensors that are no parameters: the positions' numbers, what batch norm counts in training, CLIP's temperature.
_NO_PARAMETERS = ("position_ids", "num_batches_tracked", "logit_scale")
# The autoencoder's attention in checkpoints written before diffusers 0.18.
_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
_SHOWN = 8  # of the tensors at fault, in an error
_READERS = 4  # threads: most of loading is turning arrays over and widening them


def load_unet(
    path_or_hub_id: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> UNet2DConditionModel:
    """The UNet of a diffusers folder or hub id (a pipeline's, or the component's own), with its weights in it.

    `variant` is that of the files (`fp16`), `dtype` what the network computes in, `param_dtype` what its parameters are
    kept in. Raises InputError for whatever is missing, damaged, of another network, or does not fit.
    """
    folder = component_folder(path_or_hub_id, "unet", variant=variant, revision=revision)
    config = UNetConfig.from_dict(_read_json(folder / "config.json"))
    return fill(
        lambda rngs: UNet2DConditionModel(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
        Tensors(_files(folder, _DIFFUSERS, variant), _modern),
    )


def load_vae(
    path_or_hub_id: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> Autoencoder:
    """The autoencoder, as `load_unet`; TAESD where config.json says so."""
    folder = component_folder(path_or_hub_id, "vae", variant=variant, revision=revision)
    config = _read_json(folder / "config.json")
    return fill(
        lambda rngs: make_vae(config, rngs, dtype=dtype, param_dtype=param_dtype),
        Tensors(_files(folder, _DIFFUSERS, variant), _modern),
    )


def make_vae(
    config: Mapping[str, Any],
    rngs: nnx.Rngs,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> Autoencoder:
    """The autoencoder that a `vae/config.json` describes, without its weights. Raises InputError for any other."""
    options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    match config.get("_class_name", "AutoencoderKL"):
        case "AutoencoderKL":
            return AutoencoderKL(VAEConfig.from_dict(config), **options)
        case "AutoencoderTiny":
            return AutoencoderTiny(TinyConfig.from_dict(config), **options)
        case other:
            raise InputError(f"config.json: {other} is not supported (AutoencoderKL and AutoencoderTiny are)")


def load_text_encoder(
    path_or_hub_id: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> CLIPTextModel:
    """The text encoder, as `load_unet`."""
    folder = component_folder(path_or_hub_id, "text_encoder", variant=variant, revision=revision)
    config = CLIPTextConfig.from_dict(_read_json(folder / "config.json"))
    return fill(
        lambda rngs: CLIPTextModel(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
        Tensors(_files(folder, _TRANSFORMERS, variant), _modern),
    )


def load_clip(
    path_or_hub_id: str | Path,
    *,
    revision: str | None = None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
) -> CLIPModel:
    """Both towers of CLIP, from a folder or hub id as transformers' `CLIPModel` has it; otherwise as `load_unet`."""
    from transformers import CLIPConfig as ClipFiles  # imports PyTorch, if that is there

    folder = component_folder(path_or_hub_id, "", revision=revision)
    read = _read_json(folder / "config.json")
    if read.get("model_type") != "clip":
        raise InputError(f"{folder / 'config.json'}: model_type={read.get('model_type')!r} is not 'clip'")
    try:  # transformers knows how older files tell the towers, and every default
        filled = ClipFiles.from_dict(read).to_dict()
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise InputError(f"{folder / 'config.json'}: {' '.join(str(error).split())}") from error
    config = CLIPConfig.from_dicts(filled["text_config"], filled["vision_config"], filled["projection_dim"])
    return fill(
        lambda rngs: CLIPModel(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs),
        Tensors(_files(folder, _TRANSFORMERS, None)),
    )


def load_tokenizer(path_or_hub_id: str | Path, *, revision: str | None = None) -> "CLIPTokenizer":
    """The pipeline's tokenizer."""
    from transformers import CLIPTokenizer

    folder = component_folder(path_or_hub_id, "tokenizer", revision=revision)
    # transformers would make a tokenizer without a vocabulary, to which every text is the same.
    if not ((folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()):
        raise InputError(f"{folder} holds no tokenizer.json and no vocab.json; add the tokenizer's files")
    try:
        return CLIPTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no tokenizer that loads: {error}") from error


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """`tokenize(texts) -> int32 [B, L]`, cut to the model's length; travels to worker processes.

    Padded to that length, or else to the longest of the texts.
    """

    tokenizer: "CLIPTokenizer"
    padded: bool = True

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        padding = "max_length" if self.padded else "longest"
        ids = self.tokenizer(list(texts), padding=padding, truncation=True, return_tensors="np").input_ids
        return ids.astype(np.int32)


def load_config(path_or_hub_id: str | Path, component: str, *, revision: str | None = None) -> dict[str, Any]:
    """A component's `config.json`, of which no weights are needed or fetched."""
    return _read_json(component_folder(path_or_hub_id, component, revision=revision, weights=False) / "config.json")


def load_scheduler_config(path_or_hub_id: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """The pipeline's `scheduler/scheduler_config.json`."""
    return _read_json(component_folder(path_or_hub_id, "scheduler", revision=revision) / "scheduler_config.json")


def load_model_index(path_or_hub_id: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """The pipeline's `model_index.json`."""
    return _read_json(component_folder(path_or_hub_id, "", revision=revision, weights=False) / "model_index.json")


def save_pretrained(model: nnx.Module, folder: str | Path, *, dtype: DTypeLike | None = None) -> None:
    """Writes `config.json` and the weights as safetensors, in the parameters' dtype or in `dtype`.

    What is written, diffusers (transformers for the text encoder) loads, and `load_*` reads back bit for bit. The
    weights appear under their name only when they are whole.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stem, prefix, extra = _FORMATS[type(model)]
    tensors = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        array = np.asarray(variable[...]) if dtype is None else np.asarray(variable[...]).astype(jnp.dtype(dtype))
        tensors[prefix + key_of(path)] = np.ascontiguousarray(swap_layout(path, array, to_torch=True))
    part = folder / f"{stem}.safetensors.part"
    safetensors.numpy.save_file(tensors, part, metadata={"format": "pt"})
    os.replace(part, folder / f"{stem}.safetensors")
    config = dataclasses.asdict(model.config)  # pyright: ignore[reportAttributeAccessIssue]
    (folder / "config.json").write_text(json.dumps(extra | config, indent=2) + "\n")


def key_of(path: tuple[Any, ...]) -> str:
    """The checkpoint's name of a parameter, from its path in the module."""
    *parents, leaf = path
    return ".".join(map(str, [*parents, _LEAVES.get(leaf, leaf)]))


def swap_layout(path: tuple[Any, ...], array: np.ndarray, *, to_torch: bool) -> np.ndarray:
    """HWIO <-> OIHW for convolutions, IO <-> OI for linear layers; norms, biases, embeddings are the same in both."""
    if path[-1] != "kernel":
        return array
    if array.ndim == 2:
        return array.T
    return array.transpose(3, 2, 0, 1) if to_torch else array.transpose(2, 3, 1, 0)


def component_folder(
    path_or_hub_id: str | Path,
    component: str,
    *,
    variant: str | None = None,
    revision: str | None = None,
    weights: bool = True,
) -> Path:
    """The local folder of a pipeline's component: given as it is, inside a given pipeline's folder, or from the hub.

    A model that is no pipeline is the component "". `weights=False` fetches none from the hub. Raises InputError if
    there is none.
    """
    root = TINY_SD if path_or_hub_id == "tiny-sd" else Path(path_or_hub_id)
    if not root.is_dir():
        if root.suffix in (".ckpt", ".safetensors"):
            raise InputError(
                f"model {root} is {'' if root.exists() else 'not there, and would be '}one file; a folder is needed, "
                "which diffusers (./launch/install.sh torch) makes of it: "
                f'StableDiffusionPipeline.from_single_file("{root}").save_pretrained("FOLDER")'
            )
        stems = (_DIFFUSERS, _TRANSFORMERS) if weights else ()
        hub_id = str(path_or_hub_id)
        root = _download(hub_id, component, stems, variant, revision)
        if not (root / component).is_dir():  # a repository of this component alone
            root = _download(hub_id, "", stems, variant, revision)
    if (root / component).is_dir():
        return root / component
    if (root / "config.json").is_file():
        return root
    raise InputError(f"{root} holds no {component}/ and no config.json; give a diffusers folder")


def _download(hub_id: str, component: str, stems: Sequence[str], variant: str | None, revision: str | None) -> Path:
    """Only the files of this component and variant; of weights, those whose names begin with one of `stems`."""
    names = ["*.json", "*.txt"]
    for stem in stems:
        names += (
            [f"{stem}.{variant}*.safetensors"] if variant else [f"{stem}.safetensors", f"{stem}-*-of-*.safetensors"]
        )
    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=[str(Path(component, n)) for n in names])
        )
    except HFValidationError:
        reason = "there is no such folder, and it is no hub id (owner/name)"
    except (OSError, HfHubHTTPError) as error:
        reason = f"there is no such folder, and the hub gives none ({' '.join(str(error).split())[:160]})"
    raise InputError(f"model {hub_id}: {reason}; give a diffusers folder or a hub id")


def _files(folder: Path, stem: str, variant: str | None) -> list[Path]:
    """A component's safetensors file, or an index's shards."""
    dotted = f".{variant}" if variant else ""
    index = next(folder.glob(f"{stem}.safetensors.index{dotted}.json"), None)
    single = folder / f"{stem}{dotted}.safetensors"
    if index is not None and not single.exists():
        return sorted({folder / name for name in _read_json(index)["weight_map"].values()})
    return [single]


class Tensors:
    """The tensors of safetensors files by name, read one at a time; `rename` gives a name as the module has it.

    Raises InputError for a file that is missing or damaged.
    """

    def __init__(self, files: Sequence[Path], rename: Callable[[str], str] = str) -> None:
        self.files = files
        self._where: dict[str, tuple[Any, str]] = {}
        for file in files:
            if not file.exists():
                there = ", ".join(sorted(f.name for f in file.parent.glob("*.safetensors"))) or "none"
                raise InputError(
                    f"{file} is missing (safetensors there: {there}); give the variant that is there, or the file"
                )
            try:
                handle = safetensors.safe_open(file, framework="numpy")
            except (OSError, safetensors.SafetensorError) as error:
                raise InputError(f"{file} is damaged ({error}); download or copy it again") from error
            self._where |= {rename(name): (handle, name) for name in handle.keys()}  # noqa: SIM118

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        handle, stored = self._where[name]
        return tuple(handle.get_slice(stored).get_shape())

    def read(self, name: str) -> np.ndarray:
        handle, stored = self._where[name]
        return handle.get_tensor(stored)


def _modern(name: str) -> str:
    """A tensor's present name: without the text tower's prefix, and with the attention's names of diffusers 0.18 on."""
    name = name.removeprefix("text_model.")
    if ".mid_block.attentions." in name and name.startswith(("encoder.", "decoder.")):
        for old, new in _OLD_NAMES.items():
            name = name.replace(old, new)
    return name


def fill(build: Callable[[nnx.Rngs], Model], tensors: Tensors, *, fits: str = "its config.json") -> Model:
    """The module that `build(rngs)` makes, with parameters that are read a few at a time, never all of them twice.

    Raises one InputError naming what is missing, unexpected or misshapen; `fits` is what they were expected to fit.
    """
    graphdef, abstract = nnx.split(shapes_of(build))
    flat = dict(nnx.to_flat_state(abstract))
    keys = {path: key_of(path) for path in flat}
    present = {name for name in tensors.names() if not name.endswith(_NO_PARAMETERS)}
    faults = [f"missing {key}" for key in sorted(set(keys.values()) - present)]
    faults += [f"unexpected {key}" for key in sorted(present - set(keys.values()))]
    for path, variable in flat.items():
        wanted = swap_layout(path, np.empty(variable.shape, np.bool_), to_torch=True).shape
        if keys[path] in present and tensors.shape(keys[path]) != wanted:
            faults.append(f"misshapen {keys[path]} {tensors.shape(keys[path])}, should be {wanted}")
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        place = tensors.files[0] if len(tensors.files) == 1 else tensors.files[0].parent
        raise InputError(f"{place} does not fit {fits}: {'; '.join(faults[:_SHOWN])}{more}")

    def read(path: tuple[Any, ...]) -> jax.Array:
        return jnp.asarray(swap_layout(path, tensors.read(keys[path]), to_torch=False), flat[path].dtype)

    with futures.ThreadPoolExecutor(_READERS) as pool:
        for path, array in zip(flat, pool.map(read, flat), strict=True):
            flat[path] = flat[path].replace(array)
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); give a diffusers folder") from error
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}); download or copy it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is not a JSON object; download or copy it again")
    return content


# For each network: the weights' file, the prefix of its tensors, what config.json says beside the network's own keys.
_FORMATS: dict[type, tuple[str, str, dict[str, Any]]] = {
    UNet2DConditionModel: (_DIFFUSERS, "", {"_class_name": "UNet2DConditionModel"}),
    AutoencoderKL: (_DIFFUSERS, "", {"_class_name": "AutoencoderKL"}),
    AutoencoderTiny: (_DIFFUSERS, "", {"_class_name": "AutoencoderTiny"}),
    CLIPTextModel: (
        _TRANSFORMERS,
        "text_model.",
        {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"},
    ),
}
