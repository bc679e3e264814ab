"""Pictures and captions of COCO, from its own annotations: what the paper evaluates text to image on.

Coco("annotations/captions_val2017.json", images="val2017")
"""

import json
from pathlib import Path
from typing import Any

from d2f_jax.data.sources import Example, listing, outside, read_image
from d2f_jax.errors import InputError


class Coco:
    """The pictures of a `captions_*.json` file in its order, which lie in the folder `images`, each with one caption.

    Of a picture's five captions it is the one whose annotation has the lowest id, so that the 5,000 pictures of
    val2017 are 5,000 examples. Pictures without a caption are left out. Raises `InputError` for a file or pictures that
    are wrong or missing; a picture that turns out to be damaged raises it when it is read.
    """

    def __init__(self, file: str | Path, images: str | Path | None = None) -> None:
        if images is None:
            raise InputError(f"coco:{file} does not say where its pictures are; add ?images=FOLDER, such as val2017")
        self._folder = Path(images)
        self._rows = _read(Path(file))
        names = [name for name, _ in self._rows]
        if out := outside(names):
            raise InputError(f"{file} names pictures outside their folder: {listing(out)}; move them inside")
        if missing := [name for name in names if not (self._folder / name).is_file()]:
            raise InputError(
                f"{file} names pictures that are not in {images}: {listing(missing)}; set images to theirs"
            )

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        name, text = self._rows[index]
        return {"image": read_image(self._folder / name), "text": text}


def _read(file: Path) -> list[tuple[str, str]]:
    """File name and caption of every picture that has one."""
    try:
        content = json.loads(file.read_bytes())
        names: dict[Any, str] = {image["id"]: image["file_name"] for image in content["images"]}
        told = [(note["id"], note["image_id"], note["caption"].strip()) for note in content["annotations"]]
        captions = {image: text for _, image, text in sorted(told, reverse=True)}  # the lowest id comes last
        rows = [(Path(name).as_posix(), captions[image]) for image, name in names.items() if image in captions]
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); give COCO's captions_val2017.json") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        told = " ".join(str(error).split())[:160]
        raise InputError(
            f"{file} does not hold images and annotations with captions, as COCO's captions_val2017.json ({told})"
        ) from error
    if not rows:
        raise InputError(f"{file} has no picture with a caption; give COCO's captions_val2017.json")
    return rows
