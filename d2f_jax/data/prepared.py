"""Latents and text states computed once, by `d2f_jax.prepare`: what their folder says, and a `Source` of them."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from flax import nnx

from d2f_jax import weights
from d2f_jax.data import records
from d2f_jax.data.sources import Example
from d2f_jax.errors import InputError, SaveError
from d2f_jax.models.clip import CLIPTextModel

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Split = Literal["train", "validation"]
Latents = Literal["mean", "mean_std"]

FORMAT = 1  # of the folder; one that older programs cannot read gets another number
PLAN, MANIFEST, NULL_TEXT = "plan.json", "manifest.json", "null_text.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All that decides what a folder will hold.

    Latents are the VAE's own: `scaling_factor` times them is what the UNet sees. `examples`, their numbers, are by
    split and count damaged ones.
    """

    format: int
    model: str
    variant: str
    vae_fingerprint: str
    text_fingerprint: str
    scaling_factor: float
    compute_dtype: str
    dtype: str
    image_size: int  # pixels
    resize: str
    latents: Latents
    latent_shape: tuple[int, ...]  # height, width, channels
    text_shape: tuple[int, ...]  # tokens, features
    shard_size: int  # examples
    sources: tuple[str, ...]
    held_out: int
    examples: dict[Split, int]
    image_width: int = 0  # pixels; 0 is image_size, a square
    task: str = "text_to_image"  # of "image_to_depth" the latents are depth's, and their pictures' beside them
    mirrored: bool = False  # whether there are latents of the mirrored pictures, too, beside them
    teacher: dict[str, Any] | None = None  # of pairs with noise, how it was sampled from; see `d2f_jax.reflow`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A finished file: its examples, its size in bytes, its CRC-32, and what was left out of it and why."""

    file: str
    count: int
    bytes: int
    crc32: int
    damaged: tuple[str, ...] = ()

    @classmethod
    def of(cls, file: Path, count: int, damaged: Iterable[str] = ()) -> "Shard":
        size, crc32 = file.stat().st_size, records.checksum(file)
        return cls(file=file.name, count=count, bytes=size, crc32=crc32, damaged=tuple(damaged))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished folder holds."""

    plan: Plan
    null_text: Shard
    shards: dict[Split, tuple[Shard, ...]]

    def files(self) -> list[Shard]:
        return [self.null_text, *(shard for shards in self.shards.values() for shard in shards)]


class PreparedSource:
    """The examples of a prepared folder: `text`, `text_states`, `latent_mean`, and what else `Example` has beside it.

    Raises InputError unless the preparation is finished and its files have their sizes; `verify` reads them all.
    """

    def __init__(self, folder: str | Path, split: Split = "train") -> None:
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(self.folder)
        shards = self.manifest.shards.get(split)
        if shards is None:
            raise InputError(f"{folder} has no split {split!r}, only {', '.join(sorted(self.manifest.shards))}")
        _check_files(Path(folder), self.manifest, whole=False)
        self._examples = records.Shards([Path(folder, s.file) for s in shards], [s.count for s in shards])
        empty = records.decode(Path(folder, NULL_TEXT).read_bytes(), str(Path(folder, NULL_TEXT)))
        self.null_text: np.ndarray = empty["text_states"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
        """Text states of the empty caption, float16 [L, D]."""

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]


def verify(folder: str | Path) -> Manifest:
    """Reads all files; raises InputError, which names those that are not as they were written."""
    manifest = read_manifest(Path(folder))
    _check_files(Path(folder), manifest, whole=True)
    return manifest


def check_model(
    manifest: Manifest,
    vae: weights.Autoencoder,
    text_encoder: CLIPTextModel,
    tokenizer: "CLIPTokenizer",
    *,
    image_shape: tuple[int, int],
) -> None:
    """Raises InputError for what was prepared by another VAE or text encoder, or of another height and width (pixels).

    The parameters must be at hand, not yet spread over several hosts.
    """
    plan = manifest.plan
    there = (plan.image_size, plan.image_width or plan.image_size)
    if there != image_shape:
        told, wanted = (" x ".join(map(str, sides)) for sides in (there, image_shape))
        raise InputError(
            f"the latents were prepared of {told} pixels, but config.data.image_size and image_width are {wanted}; "
            "set them to that, or prepare the latents again"
        )
    for what, there, here in (
        ("VAE", plan.vae_fingerprint, vae_fingerprint(vae)),
        ("text encoder", plan.text_fingerprint, text_fingerprint(text_encoder, tokenizer)),
    ):
        if there != here:
            raise InputError(
                f"the {what} of config.model is another ({here}) than the one of {plan.model} ({there}) by which the "
                "data were prepared; give that model, or prepare them again"
            )


def vae_fingerprint(vae: weights.Autoencoder) -> str:
    """SHA-256, 16 digits, of all that latents depend on: the encoder's parameters, in whichever files they lie."""
    kept = {key: array for key, array in _parameters(vae).items() if key.startswith(("encoder.", "quant_conv."))}
    config = dataclasses.asdict(vae.config)
    for key in ("sample_size", "force_upcast"):  # differ between copies of the same network
        config.pop(key, None)
    return _digest(kept, config)


def text_fingerprint(text_encoder: CLIPTextModel, tokenizer: "CLIPTokenizer") -> str:
    """The same of the text encoder and its tokenizer's vocabulary and length."""
    words = hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()
    config = dataclasses.asdict(text_encoder.config) | {"vocabulary": words, "length": tokenizer.model_max_length}
    return _digest(_parameters(text_encoder), config)


def read_manifest(folder: Path) -> Manifest:
    """Raises InputError if there is none, it is damaged, or of another format."""
    if not (folder / MANIFEST).is_file():
        if (folder / PLAN).is_file():
            raise InputError(f"{folder}: the preparation is not finished; run the same command again")
        raise InputError(f"{folder} holds no {MANIFEST}; make it with python -m d2f_jax.prepare --out={folder}")
    tree = read_json(folder / MANIFEST)
    try:
        shards = {split: tuple(Shard(**shard) for shard in listed) for split, listed in tree["shards"].items()}
        return Manifest(plan=_plan(tree["plan"]), null_text=Shard(**tree["null_text"]), shards=shards)
    except (AttributeError, KeyError, TypeError) as error:
        raise _damaged(folder / MANIFEST, error) from error


def read_plan(folder: Path) -> Plan | None:
    """The plan of a folder, finished or not; None if there is none. Raises InputError as `read_manifest`."""
    if not (folder / PLAN).exists():
        return None
    try:
        return _plan(read_json(folder / PLAN))
    except (KeyError, TypeError) as error:
        raise _damaged(folder / PLAN, error) from error


def finish(file: Path, shard: Shard) -> None:
    """Notes beside a shard's file that it is whole."""
    write_json(file.with_suffix(".json"), shard)


def finished(file: Path) -> Shard | None:
    """What `finish` noted, if the file is still there and as large."""
    try:
        shard = Shard(**read_json(file.with_suffix(".json")))
        return shard if file.stat().st_size == shard.bytes else None
    except (InputError, OSError, TypeError):
        return None


def read_json(file: Path) -> Any:
    """The content of a file, with tuples for lists; raises InputError if it is damaged."""
    try:
        return _tuples(json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error


def write_json(file: Path, content: Any) -> None:
    """Writes a dataclass as a whole or not at all. Raises SaveError."""
    write_bytes(file, (json.dumps(dataclasses.asdict(content), indent=2) + "\n").encode())


def write_bytes(file: Path, content: bytes) -> None:
    """Writes a file as a whole or not at all. Raises SaveError."""
    part = file.with_name(file.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(file)
    except OSError as error:
        raise SaveError(f"{file} cannot be written ({error.strerror}); make room or give another folder") from error


def _plan(tree: dict[str, Any]) -> Plan:
    if tree["format"] != FORMAT:
        raise InputError(f"the data have format {tree['format']}, this version reads {FORMAT}; prepare them again")
    return Plan(**tree)


def _check_files(folder: Path, manifest: Manifest, *, whole: bool) -> None:
    faults = []
    for shard in manifest.files():
        file = folder / shard.file
        size = file.stat().st_size if file.is_file() else None
        if size != shard.bytes:
            told = "is missing" if size is None else f"has {size} bytes instead of {shard.bytes}"
            faults.append(f"{shard.file} {told}")
        elif whole and records.checksum(file) != shard.crc32:
            faults.append(f"{shard.file} has changed since it was written")
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise InputError(f"{folder}: {', '.join(faults[:5])}{more}; copy or make it again")


def _parameters(module: nnx.Module) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.state(module))
    return {weights.key_of(path): np.asarray(variable[...], np.float32) for path, variable in flat}


def _digest(arrays: dict[str, np.ndarray], config: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for key, array in sorted(arrays.items()):
        digest.update(f"{key} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def _tuples(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _tuples(value) for key, value in tree.items()}
    return tuple(map(_tuples, tree)) if isinstance(tree, list) else tree


def _damaged(file: Path, error: Exception) -> InputError:
    return InputError(f"{file} is damaged ({' '.join(str(error).split())[:160]}); copy it again or prepare anew")
