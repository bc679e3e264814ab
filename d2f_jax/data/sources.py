"""Where examples come from: anything with a length and an index.

A source hands out decoded pictures of any size, or latents, with their captions; `d2f_jax.data.loader` makes batches
of them.
"""

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, Protocol, TypedDict, cast

import grain
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from d2f_jax.errors import InputError


class Example(TypedDict):
    """`text` is the caption; of the rest a source gives what it has, a picture or its latent at least.

    Pictures: `image` uint8 [H, W, 3]; `depth` float32 [H, W], 0 where there is none, as in the sky. Prepared ones:
    `latent_mean` and perhaps `latent_std` float16 [h, w, C], the VAE's own, that is not yet scaled; `text_states`
    float16 [L, D]. If the latent is of depth, `picture_mean` is its picture's, and `valid` bool [h, w] where depth is
    known. `mirrored_latent_mean` and its kin are of the mirrored picture: no mirror image of the others. All may have
    `noise` float32 [h, w, C], which flows to this very latent.
    """

    text: str
    image: NotRequired[np.ndarray]
    depth: NotRequired[np.ndarray]
    latent_mean: NotRequired[np.ndarray]
    latent_std: NotRequired[np.ndarray]
    picture_mean: NotRequired[np.ndarray]
    mirrored_latent_mean: NotRequired[np.ndarray]
    mirrored_latent_std: NotRequired[np.ndarray]
    mirrored_picture_mean: NotRequired[np.ndarray]
    valid: NotRequired[np.ndarray]
    noise: NotRequired[np.ndarray]
    text_states: NotRequired[np.ndarray]


LATENTS = ("latent_mean", "latent_std", "picture_mean")  # of a mirrored picture the VAE makes others


class Source(Protocol):
    """Random access to examples; must pickle, as it travels to the loader's worker processes.

    An example that cannot be read raises `InputError` or `OSError`, whose one line names it.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def held_out(source: Source, count: int) -> tuple[Source, Source]:
    """`source` without `count` evenly spaced examples, and these alone: for training and for validation."""
    if not 0 < count < len(source):
        raise InputError(f"{count} of {len(source)} examples cannot be held out; hold out 1 to {len(source) - 1}")
    chosen = _evenly(len(source), count)
    return _Selection(source, np.delete(np.arange(len(source)), chosen)), _Selection(source, chosen)


def thinned(source: Source, count: int) -> Source:
    """`count` evenly spaced examples of `source`, at most all of them."""
    return _Selection(source, _evenly(len(source), count))


def joined(sources: Sequence[Source]) -> Source:
    """The examples of `sources` one after another."""
    return cast(Source, grain.MapDataset.concatenate([grain.MapDataset.source(source) for source in sources]))


class ImageFolder:
    """A folder of pictures with `metadata.jsonl`, as the Hugging Face `imagefolder` has it.

    Every line of `metadata.jsonl` is `{"file_name": "path/inside/the/folder.jpg", "text": "its caption"}`; other
    keys are ignored. Everything that shows without decoding all the pictures is checked at once: raises
    `InputError` for a folder, line or file that is missing or wrong. A picture that turns out to be damaged when
    it is read raises `InputError` too.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        self._rows = _read_metadata(self._folder)
        _check_pictures(self._folder, [file_name for file_name, _ in self._rows])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        file_name, text = self._rows[index]
        return {"image": read_image(self._folder / file_name), "text": text}


def read_image(file: str | Path | bytes, name: str = "encoded picture", *, upright: bool = True) -> np.ndarray:
    """uint8 [H, W, 3] of a picture of any mode: transparency is laid on white, 16 bits become 8.

    It is turned as its camera says, or with `upright=False` left as it is stored.

    Raises `InputError`, which names the file, or bytes by `name`, if it is missing or does not decode.
    """
    try:
        with _open(io.BytesIO(file) if isinstance(file, bytes) else file) as picture:
            return np.asarray(_to_rgb(ImageOps.exif_transpose(picture) if upright else picture))
    except FileNotFoundError as error:
        raise InputError(f"there is no picture {file}; give the path of one") from error
    except Exception as error:  # a decoder that meets foreign bytes may raise anything
        where = name if isinstance(file, bytes) else str(file)
        raise InputError(f"{where} does not decode ({_reason(error)}); replace or remove it") from error


def outside(names: Sequence[str]) -> list[str]:
    """Those that lead out of the folder that they are in.

    By the names alone: a link may lead out, as all of them do in the cache of the Hugging Face hub.
    """
    return [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]


def listing(names: Sequence[str], shown: int = 5) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _evenly(length: int, count: int) -> np.ndarray:
    """`count` numbers from 0 to `length` - 1, in the middles of equal parts."""
    return (2 * np.arange(count) + 1) * length // (2 * max(1, count))


@dataclasses.dataclass(frozen=True)
class _Selection:
    """The examples of `source` at these indices."""

    source: Source
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]


# Not what Pillow hands to other programs, as it does PostScript.
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_MAX_PIXELS = 80_000_000  # decoded, a quarter of a gigabyte; a header of some bytes can claim any size
_METADATA = "metadata.jsonl"
_WANTED = 'write one line per picture: {"file_name": "a.jpg", "text": "its caption"}'


def _read_metadata(folder: Path) -> list[tuple[str, str]]:
    """File name and caption of every line."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give one that holds pictures and a {_METADATA}")
    file = folder / _METADATA
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise InputError(f"{folder} has no {_METADATA}; {_WANTED}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as UTF-8 text: {error}") from error
    rows = [_parse(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise InputError(f"{file} is empty; {_WANTED}")
    if out := outside([name for name, _ in rows]):
        raise InputError(f"{file} names pictures outside its folder: {listing(out)}; move them inside")
    missing = [name for name, _ in rows if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{file} names pictures that are not there: {listing(missing)}; add or unlist them")
    return rows


def _parse(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON, {error.msg} at column {error.colno}: {line[:60]!r}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where} is not a JSON object with the keys file_name and text: {line[:60]!r}")
    return _string(row, "file_name", where), _string(row, "text", where)


def _string(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise InputError(f"{where} has no key {key!r}, only {sorted(row)}")
    if not isinstance(row[key], str):
        raise InputError(f"{where}: {key} must be a string, not {row[key]!r}")
    return row[key]


def _check_pictures(folder: Path, names: list[str]) -> None:
    """Reads all headers, which is cheap; damage further inside shows when the picture is read."""
    bad = []
    for name in dict.fromkeys(names):
        try:
            _open(folder / name).close()
        except Exception as error:
            bad.append(f"{name} ({_reason(error)})")
    if bad:
        raise InputError(
            f"{folder}: {len(bad)} of {len(names)} pictures do not open: {listing(bad)}; mend or unlist them"
        )


def _open(file: Path | str | io.BytesIO) -> Image.Image:
    """The picture, of which only the header is read yet."""
    picture = Image.open(file, formats=_FORMATS)
    if picture.width * picture.height > _MAX_PIXELS:
        picture.close()
        raise ValueError(f"{picture.width} x {picture.height} pixels, the most are {_MAX_PIXELS:,}")
    return picture


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a picture"
    return " ".join(str(error).split()) or type(error).__name__


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("floating-point pixels, whose white is not known; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):
        # Pillow would clip 16 bits at 255 instead of scaling them.
        levels = np.clip(np.asarray(picture, np.float32), 0, 65535) / 257
        picture = Image.fromarray((levels + 0.5).astype(np.uint8))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
    return picture.convert("RGB")
