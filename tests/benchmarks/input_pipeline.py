"""Examples per second that the loader hands out, by source and number of worker processes.

    python tests/benchmarks/input_pipeline.py

Writes a few hundred examples of every kind into a temporary folder and reads them again and again, in batches of 32,
with tiny-sd's tokenizer; the files lie in the page cache. Nothing uses what comes out, so this is what the processors
give, not what a disk does. Mean of some seconds after the first batches; the record goes to
results/benchmarks/input_pipeline.json.

Without workers two threads read ahead, and decoders and file reads run beside each other in them. Workers pay where
Python is what takes the time; what is large and quickly read is only delayed by its way from process to process.
"""

import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

from d2f_jax import weights
from d2f_jax.data import records, shapes
from d2f_jax.data.loader import train_batches
from d2f_jax.data.open import open_source
from d2f_jax.data.shapes_world import shapes_world
from d2f_jax.data.sources import Source

BATCH, SECONDS, WORKERS = 32, 3.0, (0, 2)
RESULTS = Path(__file__).parents[2] / "results" / "benchmarks"
COUNT = 256  # examples of every source, but ShapesWorld
MODEL = Path(__file__).parents[2] / "d2f_jax/assets/tiny-sd"


def main() -> None:
    tokenize = weights.Tokenize(weights.load_tokenizer(MODEL))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, size, source in sources(Path(folder)):
            rates = [examples_per_second(source, tokenize, size, workers) for workers in WORKERS]
            rows.append([name, size, *rates])
            print(rows[-1], flush=True)
    record = {
        "workers": WORKERS,
        "rows": rows,
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    record["versions"] = {name: version(name) for name in ("grain", "pillow")}
    (RESULTS / "input_pipeline.json").write_text(json.dumps(record, indent=1) + "\n")


def examples_per_second(source: Source, tokenize: weights.Tokenize, size: int, workers: int) -> float:
    options = {"batch_size": BATCH, "image_shape": (size, size), "seed": 0, "num_workers": workers}
    batches = train_batches([source], tokenize, **options)
    for _ in range(12):  # what was read ahead while the workers started is not counted
        next(batches)
    began, done = time.perf_counter(), 0
    while (seconds := time.perf_counter() - began) < SECONDS:
        next(batches)
        done += BATCH
    batches.close()
    return done / seconds


def sources(folder: Path) -> Iterable[tuple[str, int, Source]]:
    for size in (48, 64):
        world = shapes_world(folder / "world", size=size, num_train=2000, num_validation=1, split="train")
        yield "ShapesWorld", size, world
    write_images(folder / "images")
    yield "image folder, JPEG", 512, open_source(f"image_folder:{folder / 'images'}")
    yield "TFDS, PNG", 64, open_source(f"tfds:shapes_world/64px_2000_1?data_dir={folder / 'world'}")
    captions = [f"caption number {i}" for i in range(COUNT)]
    jpegs = [(folder / f"images/{i}.jpg").read_bytes() for i in range(COUNT)]
    write_tar(folder / "jpeg.tar", captions, "image.jpg", jpegs)
    yield "WebDataset, JPEG", 512, open_source(f"webdataset:{folder / 'jpeg.tar'}")
    latents = [npy(np.random.default_rng(i).normal(size=(4, 64, 64)).astype(np.float32)) for i in range(COUNT)]
    write_tar(folder / "latent.tar", captions, "image_latent.npy", latents)
    yield "WebDataset, latents", 512, open_source(f"webdataset:{folder / 'latent.tar'}?latent_scale=0.18215")
    write_prepared(folder / "prepared.array_record", captions)
    yield "prepared latents and text", 512, records.Shards([folder / "prepared.array_record"], [COUNT])


def write_images(folder: Path) -> None:
    """Photograph-like: smooth, with noise as a sensor has it."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(COUNT):
        scene = shapes.sample_scene(0, i)
        picture = Image.fromarray(shapes.render(scene, 64).image).resize((512, 512), Image.Resampling.BICUBIC)
        pixels = np.asarray(picture) + rng.normal(scale=6, size=(512, 512, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
        lines.append(json.dumps({"file_name": f"{i}.jpg", "text": scene.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def write_tar(path: Path, captions: Sequence[str], field: str, contents: Sequence[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for i, (caption, content) in enumerate(zip(captions, contents, strict=True)):
            for name, data in [(field, content), ("prompt.txt", caption.encode())]:
                info = tarfile.TarInfo(f"{i:06d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def write_prepared(file: Path, captions: Sequence[str]) -> None:
    """Of Stable Diffusion's size: latents [64, 64, 4] with deviations and text states [77, 1024], in half precision."""
    rng = np.random.default_rng(0)
    latent, text_states = (rng.normal(size=shape).astype(np.float16) for shape in [(64, 64, 4), (77, 1024)])
    arrays = {"latent_mean": latent, "latent_std": np.abs(latent), "text_states": text_states}
    records.write_shard(file, [records.encode(arrays | {"text": caption}) for caption in captions])


if __name__ == "__main__":
    main()
