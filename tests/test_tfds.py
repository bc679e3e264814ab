"""Data sets of TensorFlow Datasets: prepared as array_record, read without TensorFlow and without their code."""

import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from d2f_jax.data import shapes, shapes_world
from d2f_jax.data.loader import train_batches
from d2f_jax.data.open import open_source
from d2f_jax.data.tfds_source import TFDSSource
from d2f_jax.errors import InputError

FEATURES = tfds.features


def png(value: int) -> io.BytesIO:
    file = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(file, "png")
    file.seek(0)
    return file


class TaggedPictures(tfds.core.GeneratorBasedBuilder):
    """Five grey pictures with captions of every kind; the first has none of `captions`, the last a damaged picture."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": FEATURES.Image(shape=(None, None, 3)),
            "caption": FEATURES.Text(),
            "captions": FEATURES.Sequence(FEATURES.Text()),
            "objects": FEATURES.Sequence({"name": FEATURES.Text(), "id": np.int64}),
            "inner": {"image": FEATURES.Image(shape=(None, None, 3)), "note": FEATURES.Text()},
            "label": np.int64,
        }
        return tfds.core.DatasetInfo(
            builder=self, features=FEATURES.FeaturesDict(features), disable_shuffling=True, description=""
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for i in range(count):
            yield (
                i,
                {
                    "image": io.BytesIO(b"damaged") if i == 4 else png(i),
                    "caption": str(i),
                    "captions": [f"first {i}", f"second {i}"] if i else [],
                    "objects": [{"name": f"object {i}", "id": 1}, {"name": "other", "id": 2}],
                    "inner": {"image": png(i + 100), "note": b"\xff" if i == 1 else "note"},
                    "label": i,
                },
            )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    TaggedPictures(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


def opened(data_dir: str, **options) -> TFDSSource:
    return TFDSSource("tagged_pictures", data_dir=data_dir, **options)


def test_pictures_and_captions_without_tensorflow(data_dir):
    source = pickle.loads(pickle.dumps(opened(data_dir)))
    assert len(source) == 5
    for i in range(4):
        np.testing.assert_array_equal(source[i]["image"], np.full((6, 8, 3), i))
        assert source[i]["text"] == str(i)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
    "text, expected", [("caption", "2"), ("captions", "first 2"), ("objects/name", "object 2"), ("inner/note", "note")]
)
def test_captions_may_be_several_or_inside(data_dir, text, expected):
    assert opened(data_dir, text=text)[2]["text"] == expected


def test_pictures_may_be_inside(data_dir):
    assert opened(data_dir, image="inner/image")[2]["image"][0, 0, 0] == 102


@pytest.mark.parametrize("split, count", [("train", 5), ("test", 2), ("train[:40%]", 2), ("train+test", 7)])
def test_splits(data_dir, split, count):
    assert len(opened(data_dir, split=split)) == count


def test_the_folder_itself_and_the_line(data_dir):
    assert len(TFDSSource(f"{data_dir}/tagged_pictures/1.0.0")) == 5
    line = f"tfds:tagged_pictures:1.0.0?split=test&text=captions&data_dir={data_dir}"
    assert open_source(line)[1]["text"] == "first 1"


def test_shapes_world_is_one_of_them(tmp_path):
    shapes_world.shapes_world(tmp_path, size=16, num_train=2, num_validation=1, split="train")
    example = open_source(f"tfds:shapes_world/16px_2_1?data_dir={tmp_path}")[1]
    scene = shapes.sample_scene(shapes_world.WORLD_SEEDS["train"], 1)
    np.testing.assert_array_equal(example["image"], shapes.render(scene, 16).image)
    assert example["text"] == scene.caption


@pytest.mark.parametrize(
    "options, told",
    [
        ({"text": "txt"}, "no feature 'txt'; set text to one of caption, captions, image, inner, label, objects$"),
        ({"text": "inner/caption"}, "no feature 'inner/caption'; set text to"),
        ({"text": "caption/x"}, "no feature 'caption/x'"),
        ({"image": "picture"}, "no feature 'picture'; set image to one of"),
        ({"image": "caption"}, "the feature 'caption' is Text, no Image; set image to another"),
        (
            {"split": "validation"},
            r"split=validation: Unknown split 'validation'. Should be one of \['train', 'test'\]",
        ),
        ({"split": "train[:"}, "split=train"),
    ],
)
def test_what_is_not_there_is_told(data_dir, options, told):
    with pytest.raises(InputError, match=told) as error:
        opened(data_dir, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["mnist", "no_such_thing", "coco_captions/2014", "tagged_pictures:9.0.0", "kaggle:a/b"]
)
def test_what_is_not_prepared_is_told(data_dir, name):
    with pytest.raises(InputError, match=f"no data set {name} is prepared below .*; give data_dir, or the folder"):
        TFDSSource(name, data_dir=data_dir)


def test_no_data_set_at_all(tmp_path):
    with pytest.raises(InputError, match=r"is not a prepared TFDS data set: Could not read dataset info"):
        TFDSSource(str(tmp_path))
    with pytest.raises(InputError, match=r"a name! is not a prepared TFDS data set: Parsing builder name"):
        TFDSSource("a name!")


def test_files_without_random_access_are_refused(data_dir, tmp_path):
    prepared = Path(data_dir, "tagged_pictures/1.0.0")
    info = json.loads((prepared / "dataset_info.json").read_text())
    (tmp_path / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    shutil.copy(prepared / "features.json", tmp_path)
    with pytest.raises(InputError, match="is prepared as tfrecord, which has no random access; prepare it with"):
        TFDSSource(str(tmp_path))


@pytest.mark.parametrize(
    "index, options, told",
    [
        (4, {}, r"tagged_pictures train\[4\]: the picture does not decode \(not a picture\)"),
        (0, {"text": "captions"}, r"tagged_pictures train\[0\] has no caption in 'captions'"),
        (1, {"text": "inner/note"}, r"tagged_pictures train\[1\]: 'inner/note' is not UTF-8 text"),
        (1, {"text": "label"}, r"tagged_pictures train\[1\]: 'label' is int, no text"),
        (1, {"text": "objects"}, r"tagged_pictures train\[1\]: 'objects' is dict, no text"),
    ],
)
def test_a_damaged_example_is_named(data_dir, index, options, told):
    with pytest.raises(InputError, match=told) as error:
        opened(data_dir, **options)[index]
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_told(tmp_path):
    shapes_world.shapes_world(tmp_path, size=16, num_train=40, num_validation=1, split="train")
    (file,) = tmp_path.rglob("*train.array_record*")
    source = open_source(f"tfds:shapes_world/16px_40_1?data_dir={tmp_path}")
    content = bytearray(file.read_bytes())
    used = len(content.rstrip(b"\0"))
    content[used // 3 : used // 2] = b"\xff" * (used // 2 - used // 3)
    file.write_bytes(content)
    broken = 0
    for i in range(len(source)):
        try:
            source[i]
        except InputError as error:
            broken += 1
            assert "\n" not in str(error)
    assert broken > 0


def test_loads_with_workers(data_dir):
    source = opened(data_dir)
    options = {"batch_size": 5, "image_shape": (6, 6), "seed": 0, "on_damage": "skip"}
    alone = train_batches([source], numbers, **options)
    helped = train_batches([source], numbers, **options, num_workers=1)
    one, other = next(alone), next(helped)
    helped.close()
    assert sorted(one["image"][:, 0, 0, 0]) == [0, 0, 1, 2, 3] and sum(one["weight"]) == 4
    np.testing.assert_array_equal(one["image"], other["image"])
    assert one["damaged"] == other["damaged"] and "tagged_pictures train[4]" in one["damaged"][0]


def numbers(captions) -> np.ndarray:
    return np.array([[int(caption or -1)] for caption in captions])
