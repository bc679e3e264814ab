"""The loader: a row depends on its place in the data alone, and what cannot be read is never another example."""

import dataclasses
import multiprocessing
import os
import pickle
import signal

import numpy as np
import pytest

from d2f_jax.data import order
from d2f_jax.data.depth import normalised
from d2f_jax.data.fit import Fit, fit_depth, fit_image, picture_and_depth
from d2f_jax.data.loader import train_batches
from d2f_jax.data.sources import Example, held_out
from d2f_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Example i is a picture of the grey level i + `first`, brighter to the right, with the caption `i + first`."""

    count: int
    size: int = 8
    first: int = 0
    depth: bool = False
    noise: bool = False

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        if index >= self.count:
            raise IndexError(index)
        columns = np.arange(self.size, dtype=np.uint8) + self.first + index
        plane = np.broadcast_to(columns, (self.size, self.size))
        example = {"image": np.repeat(plane[..., None], 3, -1), "text": str(self.first + index)}
        if self.depth:
            example["depth"] = plane.astype(np.float32)
        if self.noise:
            example["noise"] = np.repeat(plane[:4, :4, None], 4, -1).astype(np.float32)
        return example


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Example i has the latent i, brighter to the right, and text states i + 1."""

    count: int
    with_std: bool = True
    text_states: bool = True
    size: int = 4

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        columns = np.arange(self.size, dtype=np.float16) / 8 + index
        latent = np.broadcast_to(columns[None, :, None], (self.size, self.size, 4))
        example = {"latent_mean": latent, "text": str(index), "noise": -latent.astype(np.float32)}
        if self.with_std:
            example["latent_std"] = latent / 2
        if self.text_states:
            example["text_states"] = np.full((3, 2), index + 1, np.float16)
        return example


@dataclasses.dataclass(frozen=True)
class Mirrored:
    """Latents of depth, and those of the mirrored pictures, which are their negatives; depth is known on a diagonal."""

    count: int = 3
    lacking: str = ""

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        example = {
            "latent_mean": np.full((4, 4, 4), index, np.float16),
            "valid": np.eye(4, dtype=bool),
            "text": str(index),
        }
        example["picture_mean"] = example["latent_mean"] + 1
        example |= {f"mirrored_{name}": -example[name] for name in ("latent_mean", "picture_mean")}
        return {name: value for name, value in example.items() if name != self.lacking}


@dataclasses.dataclass(frozen=True)
class Damaged(Numbered):
    """Every third example is broken, in one of three ways."""

    def __getitem__(self, index: int):
        if index % 3 == 1:
            match index % 9:
                case 1:
                    raise InputError(f"{index}.png does not decode")
                case 4:
                    raise FileNotFoundError(f"{index}.png is gone")
                case _:
                    return {"text": "a caption alone"}
        return super().__getitem__(index)


class Broken(Numbered):
    def __getitem__(self, index: int):
        raise InputError(f"{index}.png does not decode")


def tokenize(texts) -> np.ndarray:
    """The caption's number in two equal tokens; -1 for the empty caption."""
    return np.array([[int(text or -1)] * 2 for text in texts])


RANDOM = {"random_flip": True, "caption_dropout": 0.3, "crop": "random"}
MIXED = (Numbered(10), Numbered(7, first=50), Numbered(3, first=100))


def batches(*sources, **changes):
    options = {"batch_size": 4, "image_shape": (8, 8), "seed": 5}
    return train_batches(sources or (Numbered(10),), tokenize, **{**options, **changes})


def ids(iterator, steps: int) -> list[list[int]]:
    return [next(iterator)["input_ids"][:, 0].tolist() for _ in range(steps)]


def assert_same(a, b) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        np.testing.assert_array_equal(value, b[name])


def test_a_batch_has_the_promised_shapes():
    batch = next(batches(Numbered(10, depth=True, noise=True), image_shape=(4, 6), depth=True))
    assert batch["image"].shape == (4, 4, 6, 3) and batch["image"].dtype == np.uint8
    assert batch["depth"].shape == (4, 4, 6) and batch["depth"].dtype == np.float32
    assert batch["valid"].shape == (4, 4, 6) and batch["valid"].dtype == np.bool_
    assert batch["noise"].shape == (4, 4, 4, 4) and batch["noise"].dtype == np.float32
    assert batch["input_ids"].shape == (4, 2) and batch["input_ids"].dtype == np.int32
    assert batch["weight"].tolist() == [1, 1, 1, 1] and batch["weight"].dtype == np.float32
    assert batch["damaged"] == ()


@pytest.mark.parametrize("with_std", [False, True])
@pytest.mark.parametrize("text_states", [False, True])
def test_prepared_examples_keep_their_arrays(with_std, text_states):
    batch = next(batches(Prepared(10, with_std, text_states)))
    text = "text_states" if text_states else "input_ids"
    assert set(batch) == {"latent_mean", "noise", "weight", "damaged", text} | ({"latent_std"} if with_std else set())
    index = batch["latent_mean"][:, 0, 0, 0]
    assert batch["latent_mean"].shape == (4, 4, 4, 4) and batch["latent_mean"].dtype == np.float16
    np.testing.assert_array_equal(batch["noise"], -batch["latent_mean"].astype(np.float32))
    np.testing.assert_array_equal(batch[text].reshape(4, -1)[:, 0], index + 1 if text_states else index)


def test_pictures_keep_their_captions():
    for _, batch in zip(range(5), batches(), strict=False):
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["input_ids"][:, 0])


@pytest.mark.parametrize("few", [0, 5000])  # below it the order is our own, else Grain's
def test_every_epoch_holds_everything_once_in_another_order(few, monkeypatch):
    monkeypatch.setattr(order, "_FEW", few)
    rows = [row for batch in ids(batches(batch_size=5), 8) for row in batch]
    epochs = [rows[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides():
    assert ids(batches(), 6) == ids(batches(), 6)
    assert ids(batches(), 6) != ids(batches(seed=6), 6)


@pytest.mark.parametrize("count", [1, 3])
def test_batches_of_one(count):
    rows = [row for batch in ids(batches(Numbered(count), batch_size=1), 12) for row in batch]
    assert [rows.count(i) for i in range(count)] == [12 // count] * count


def test_fewer_pictures_than_a_batch():
    rows = [row for batch in ids(batches(Numbered(3), batch_size=7), 6) for row in batch]
    assert [rows.count(i) for i in range(3)] == [14, 14, 14]


def test_a_mixture_has_its_shares_and_every_source_its_epochs():
    rows = [row for batch in ids(batches(*MIXED, weights=(6, 3, 1), batch_size=10), 14) for row in batch]
    parts = [[row for row in rows if low <= row < low + 50] for low in (0, 50, 100)]
    assert [len(part) for part in parts] == [84, 42, 14]
    assert all(sorted(parts[0][i : i + 10]) == list(range(10)) for i in range(0, 80, 10))
    assert all(sorted(parts[1][i : i + 7]) == list(range(50, 57)) for i in range(0, 42, 7))
    equal = [row for batch in ids(batches(*MIXED, batch_size=6), 10) for row in batch]
    assert [sum(low <= row < low + 50 for row in equal) for low in (0, 50, 100)] == [20, 20, 20]


def test_equal_sources_are_not_shuffled_alike():
    rows = np.array(ids(batches(Numbered(20), Numbered(20, first=50), batch_size=40), 1)[0])
    assert rows[rows < 50].tolist() != (rows[rows >= 50] - 50).tolist()


@pytest.mark.parametrize("sources", [(Numbered(10, size=13),), MIXED, (Mirrored(10),)])
@pytest.mark.parametrize("split", [[[0, 1, 2, 3, 4, 5]], [[0, 3], [1, 2, 4], [5]], [[1, 4], [0, 5], [2, 3]]])
def test_the_processes_share_the_global_batch(sources, split):
    options = {**RANDOM, "batch_size": 6}
    if isinstance(sources[0], Mirrored):
        options |= {"crop": "center", "depth": True}
    whole = batches(*sources, **options)
    parts = [batches(*sources, **options, rows=rows) for rows in split]
    for _ in range(4):
        one = next(whole)
        for rows, part in zip(split, parts, strict=True):
            expected = {k: v if k == "damaged" else v[rows] for k, v in one.items()}
            assert_same(next(part), expected)


@pytest.mark.parametrize("sources", [(Numbered(10),), MIXED])
@pytest.mark.parametrize("first", [1, 3, 100])
def test_beginning_later_is_skipping_batches(sources, first):
    straight = batches(*sources, **RANDOM)
    for _ in range(first):
        next(straight)
    resumed = batches(*sources, **RANDOM, first_batch=first)
    split = [batches(*sources, **RANDOM, first_batch=first, rows=rows) for rows in ([0, 2], [1, 3])]
    for _ in range(5):
        expected = next(straight)
        assert_same(next(resumed), expected)
        even, odd = (next(part)["input_ids"] for part in split)
        np.testing.assert_array_equal(np.stack([even, odd], 1).reshape(4, 2), expected["input_ids"])


def test_beginning_later_takes_no_time():
    assert next(batches(first_batch=10**9))["image"].shape == (4, 8, 8, 3)


@pytest.mark.parametrize("sources", [(Numbered(10),), MIXED])
def test_worker_processes_change_nothing(sources):
    options = {**RANDOM, "first_batch": 3}
    alone, helped = batches(*sources, **options), batches(*sources, **options, num_workers=2, read_ahead=1)
    part = batches(*sources, **options, rows=[1, 2], num_workers=1)
    for _ in range(4):
        expected = next(alone)
        assert_same(next(helped), expected)
        np.testing.assert_array_equal(next(part)["image"], expected["image"][1:3])
    helped.close()
    part.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("warning", [signal.SIGTERM, signal.SIGUSR1])
def test_workers_outlive_the_warnings_of_schedulers(warning):
    alone, helped = batches(Numbered(10)), batches(Numbered(10), num_workers=1, read_ahead=1)
    for _ in range(2):
        assert_same(next(helped), next(alone))
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, warning)
    helped.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damage_stops_and_is_named(num_workers):
    iterator = batches(Damaged(9), num_workers=num_workers)
    with pytest.raises(InputError, match=r"^example \d: (\d.png (does not decode|is gone)|there is neither)") as error:
        for _ in range(3):
            next(iterator)
    assert "\n" not in str(error.value)
    iterator.close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damage_that_is_skipped_leaves_a_row_without_weight(num_workers):
    iterator = batches(Damaged(9), on_damage="skip", batch_size=9, num_workers=num_workers)
    for _ in range(2):
        batch = next(iterator)
        bad = batch["weight"] == 0
        assert sorted(batch["input_ids"][~bad, 0]) == [0, 2, 3, 5, 6, 8]
        np.testing.assert_array_equal(batch["image"][~bad][:, 0, 0, 0], batch["input_ids"][~bad, 0])
        assert (batch["image"][bad] == 0).all() and (batch["input_ids"][bad] == -1).all()
        assert sorted(batch["damaged"]) == [
            "example 1: 1.png does not decode",
            "example 4: 4.png is gone",
            "example 7: there is neither a picture nor a latent; add one or leave the example out",
        ]
    iterator.close()


def test_a_whole_batch_may_be_damaged():
    iterator = batches(Damaged(9), on_damage="skip", batch_size=1)
    found = [next(iterator) for _ in range(9)]
    assert sorted(batch["weight"][0] for batch in found) == [0] * 3 + [1] * 6
    assert all(batch["image"].shape == (1, 8, 8, 3) for batch in found)


def test_what_does_not_fit_the_others_is_damage():
    class Odd(Prepared):
        def __getitem__(self, index: int):
            example = super().__getitem__(index)
            if index == 1:
                example["latent_mean"] = example["latent_mean"][:2]
            if index == 2:
                del example["noise"]
            if index == 3:
                example["text_states"] = np.zeros((5, 2), np.float16)
            return example

    damaged = "\n".join(sorted(next(batches(Odd(4), on_damage="skip"))["damaged"]))
    assert "example 1: latent_mean has the shape (2, 4, 4), in other examples (4, 4, 4)" in damaged
    assert "example 2: there is no noise, which other examples have" in damaged
    assert "example 3: text_states has the shape (5, 2)" in damaged


def test_latents_and_their_noise_have_one_shape():
    class Odd(Prepared):
        def __getitem__(self, index: int):
            return super().__getitem__(index) | {"noise": np.zeros((2, 2, 4), np.float32)}

    with pytest.raises(InputError, match=r"latent_mean \(4, 4, 4\), .*, noise \(2, 2, 4\) must have one shape"):
        batches(Odd(3))


def test_a_source_of_damage_alone_is_refused():
    with pytest.raises(InputError, match=r"none of 8 examples can be used; the first is example 0: 0\.png does not"):
        batches(Broken(20), on_damage="skip")
    with pytest.raises(InputError, match=r"example 0 of source 1: 0\.png does not decode"):
        batches(Numbered(4), Broken(20))


def test_captions_drop_and_pictures_flip_as_often_as_asked():
    batch = next(batches(batch_size=300, caption_dropout=0.2, random_flip=True))
    assert np.mean(batch["input_ids"][:, 0] == -1) == pytest.approx(0.2, abs=0.07)
    flipped = batch["image"][:, 0, 0, 0] > batch["image"][:, 0, -1, 0]
    assert flipped.mean() == pytest.approx(0.5, abs=0.09)
    plain = next(batches(batch_size=300))
    assert not (plain["image"][:, 0, 0, 0] > plain["image"][:, 0, -1, 0]).any()
    assert (plain["input_ids"] >= 0).all()


def test_dropped_text_states_are_those_of_the_empty_caption():
    null_text = np.array([[-1, 0.5]] * 3, np.float16)
    batch = next(batches(Prepared(10), batch_size=300, caption_dropout=0.2, null_text=null_text))
    dropped = batch["text_states"][:, 0, 0] < 0
    assert dropped.mean() == pytest.approx(0.2, abs=0.07)
    np.testing.assert_array_equal(batch["text_states"][dropped], np.broadcast_to(null_text, (dropped.sum(), 3, 2)))


def test_a_flip_mirrors_everything_or_nothing():
    batch = next(batches(Numbered(9, first=1, depth=True), batch_size=30, random_flip=True, depth=True))
    rising = {name: batch[name][:, 0, 0] < batch[name][:, 0, -1] for name in ("image", "depth")}
    assert 5 < rising["depth"].sum() < 25
    np.testing.assert_array_equal(rising["image"][:, 0], rising["depth"])


def test_of_latents_those_of_the_mirrored_picture_are_taken():
    batch = next(batches(Mirrored(), batch_size=60, random_flip=True, depth=True))
    assert not any(name.startswith("mirrored") for name in batch)
    turned = batch["picture_mean"][:, 0, 0, 0] < 0
    assert 15 < turned.sum() < 45
    for row, mirrored in enumerate(turned):
        sign = -1 if mirrored else 1
        np.testing.assert_array_equal(sign * batch["latent_mean"][row] + 1, sign * batch["picture_mean"][row])
        np.testing.assert_array_equal(batch["valid"][row], np.eye(4)[:, ::sign])
    plain = next(batches(Mirrored(), batch_size=60, depth=True))
    assert (plain["picture_mean"] > 0).all() and not any(name.startswith("mirrored") for name in plain)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (
            Mirrored(lacking="mirrored_picture_mean"),
            "needs latents of the mirrored picture, .* prepare the data again with",
        ),
        (Numbered(9, depth=True, noise=True), "would mirror a pair, .* set config.data.random_flip=False"),
    ],
)
def test_what_has_no_mirror_image_is_not_mirrored(source, said):
    for on_damage in ("stop", "skip"):
        with pytest.raises(InputError, match=f"random_flip {said}"):
            batches(source, random_flip=True, depth=True, on_damage=on_damage)


def test_one_knob_leaves_the_other_alone():
    flipped = next(batches(batch_size=40, random_flip=True))["image"]
    np.testing.assert_array_equal(flipped, next(batches(batch_size=40, random_flip=True, caption_dropout=0.5))["image"])
    cropped = next(batches(batch_size=40, crop="random", image_shape=(8, 8)))
    np.testing.assert_array_equal(cropped["input_ids"], next(batches(batch_size=40))["input_ids"])


@dataclasses.dataclass(frozen=True)
class PreparedDepth:
    """As `d2f_jax.prepare` leaves depth."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int):
        latent = np.full((4, 4, 4), index, np.float16)
        return {"latent_mean": latent, "picture_mean": latent + 1, "valid": np.zeros((4, 4), bool), "text": ""}


WHOLE = Fit(
    image_shape=(8, 8),
    depth=True,
    resize="aspect",
    crop="center",
    random_flip=False,
    caption_dropout=0.0,
    null_text=None,
)


@dataclasses.dataclass(frozen=True)
class Wide:
    """One picture and its depth, 8 x 32, whose value is the column."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        columns = np.broadcast_to(np.arange(32, dtype=np.uint8), (8, 32))
        return {"image": np.repeat(columns[..., None], 3, -1), "text": "0", "depth": columns.astype(np.float32)}


def test_a_random_crop_takes_picture_and_depth_from_the_same_place():
    batch = next(batches(Wide(), batch_size=60, crop="random", depth=True))
    left = batch["image"][:, 0, 0, 0]
    assert left.min() < 4 and left.max() > 20 and len(set(left)) > 12
    for first, depth in zip(left.astype(int), batch["depth"], strict=True):
        # Depth is of the nearest pixel, the picture is interpolated: they begin within a pixel of each other.
        near = [normalised(np.tile(np.arange(k, k + 8.0), (8, 1)))[0] for k in (first - 1, first, first + 1)]
        assert min(np.abs(depth - wanted).max() for wanted in near) < 1e-6
    wider = next(batches(Wide(), batch_size=60, crop="random", image_shape=(8, 24)))["image"][:, 0, :, 0]
    assert wider[:, 0].min() < 2 and wider[:, 0].max() > 6 and wider.shape == (60, 24)
    centre = next(batches(Wide(), batch_size=2))
    np.testing.assert_array_equal(centre["image"][:, 0, :, 0], [np.arange(12, 20)] * 2)


def test_fixed_squeezes_instead_of_cutting():
    image, depth = picture_and_depth(Wide()[0], dataclasses.replace(WHOLE, resize="fixed"))
    np.testing.assert_array_equal(depth[0], np.arange(8) * 4 + 2)
    np.testing.assert_allclose(image[0, :, 0], np.arange(8) * 4 + 1.5, atol=1)


def test_depth_is_read_where_it_is_asked_for_and_then_has_no_caption():
    plain = next(batches(Numbered(10), Numbered(10, depth=True)))
    assert not {"depth", "valid"} & plain.keys()
    with_depth = next(batches(Numbered(10, first=3, depth=True), depth=True))
    assert (with_depth["input_ids"] == next(batches(Numbered(10), caption_dropout=1.0))["input_ids"]).all()
    with pytest.raises(InputError, match="there is no depth; add it, or leave the example out"):
        batches(Numbered(10, depth=True), Numbered(10), depth=True)
    with pytest.raises(InputError, match="the latents have no picture's beside them; prepare the data with the config"):
        batches(Prepared(9), depth=True)


def test_the_text_of_prepared_depth_is_the_folder_s_empty_one():
    null_text = np.ones((2, 5), np.float16)
    batch = next(batches(PreparedDepth(), depth=True, null_text=null_text))
    np.testing.assert_array_equal(batch["text_states"], [null_text] * 4)
    assert "input_ids" not in batch and batch["picture_mean"].shape == (4, 4, 4, 4) and not batch["valid"].any()
    with pytest.raises(InputError, match="the latents are of depth; prepare the data with the config's task"):
        batches(PreparedDepth())


@pytest.mark.parametrize("height, width", [(8, 8), (20, 36), (33, 15), (5, 9)])
def test_fitting_cuts_out_the_centre(height, width):
    columns = np.abs(np.arange(width) - (width - 1) / 2)
    image = np.broadcast_to((columns * 255 / columns.max())[None, :, None], (height, width, 3)).astype(np.uint8)
    fitted = fit_image(image, (8, 8))
    assert fitted.shape == (8, 8, 3)
    assert np.abs(fitted.astype(int) - fitted[:, ::-1]).max() <= 1  # the middle stays the middle
    np.testing.assert_array_equal(fit_image(np.full((height, width, 3), 77, np.uint8), (8, 8)), 77)


@pytest.mark.parametrize("height, width", [(6, 8), (12, 32), (30, 8), (33, 15), (7, 100)])
@pytest.mark.parametrize("resize", ["aspect", "fixed"])
def test_rectangles_are_cut_out_as_large_as_they_fit_or_squeezed_whole(height, width, resize):
    fit = dataclasses.replace(WHOLE, image_shape=(6, 8), resize=resize)
    scale = min(height / 6, width / 8)
    for axis, (side, of) in enumerate([(6, height), (8, width)]):
        step = scale if resize == "aspect" else of / side
        wanted = (of - side * step) / 2 + (np.arange(side) + 0.5) * step  # where the centres of pixels lie
        plane = np.indices((height, width))[axis]
        example: Example = {"image": np.repeat(plane[..., None], 3, -1).astype(np.uint8), "depth": plane, "text": ""}
        image, depth = picture_and_depth(example, fit)
        assert image.shape == (6, 8, 3) and depth is not None and depth.shape == (6, 8)
        along = (slice(None), None) if axis == 0 else (None, slice(None))
        assert np.abs(depth + 0.5 - wanted[along]).max() <= 0.5
        assert np.abs(image[..., 0] + 0.5 - wanted[along]).max() <= 0.5 + 0.1 * step


def test_fitting_does_not_alias():
    stripes = np.broadcast_to((np.arange(64) % 2 * 255)[None, :, None], (64, 64, 3)).astype(np.uint8)
    assert np.abs(fit_image(stripes, (8, 8))[:, 1:-1].astype(int) - 127).max() <= 12


def test_depth_is_never_averaged():
    depth = np.where(np.arange(30) < 11, 1.0, 9.0)[None].repeat(30, 0)
    assert set(np.unique(fit_depth(depth, (7, 7), (0, 0, 30, 30)))) == {1.0, 9.0}


@pytest.mark.parametrize("count", [1, 3, 9])
def test_held_out_examples_are_spread_and_no_longer_trained_on(count):
    train, validation = (pickle.loads(pickle.dumps(part)) for part in held_out(Numbered(10), count))
    texts = [[int(part[i]["text"]) for i in range(len(part))] for part in (train, validation)]
    assert sorted(texts[0] + texts[1]) == list(range(10))
    assert len(validation) == count
    gaps = np.diff([-1, *texts[1], 10])
    assert gaps.max() - gaps.min() <= 10 // count


@pytest.mark.parametrize("count", [0, 10, 11])
def test_something_is_left_to_train_on_and_to_hold_out(count):
    with pytest.raises(InputError, match=f"{count} of 10 examples cannot be held out; hold out 1 to 9"):
        held_out(Numbered(10), count)


@pytest.mark.parametrize(
    "sources, options, told",
    [
        ((Numbered(0),), {}, "the data set is empty"),
        ((Numbered(3),), {"batch_size": 0}, "batch_size=0 must be at least 1"),
        ((Numbered(3),), {"rows": []}, r"rows=\[\] must be increasing numbers from 0 to 3"),
        ((Numbered(3),), {"rows": [1, 1]}, r"rows=\[1, 1\] must be increasing"),
        ((Numbered(3),), {"rows": [2, 4]}, r"rows=\[2, 4\] must be increasing"),
        ((Numbered(3),), {"weights": [1, 2]}, "2 weights for 1 sources"),
        (MIXED, {"weights": [1, 2, 0]}, r"weights=\(1, 2, 0\) must be positive"),
        ((Numbered(3),), {"first_batch": -1}, "first_batch=-1 must be at least 0"),
        ((Numbered(3),), {"resize": "squash"}, "resize='squash' is none of aspect, fixed"),
        ((Numbered(3),), {"on_damage": "ignore"}, "on_damage='ignore' is none of stop, skip"),
        ((Numbered(3),), {"caption_dropout": 1.5}, "caption_dropout=1.5 is no probability"),
        ((Prepared(3),), {"caption_dropout": 0.1}, r"null_text has the shape None, .* that of text states \(3, 2\)"),
        ((Numbered(3, noise=True),), {"crop": "random"}, "crop='random' does not go with noise"),
        ((Prepared(3),), {"crop": "random"}, "crop='random' does not go with latent_mean"),
        ((Numbered(3), Prepared(3)), {}, r"source 1 gives latent_mean \(4, 4, 4\), .* source 0 image \(8, 8, 3\)"),
        ((Prepared(3), Prepared(3, size=6)), {}, r"source 1 gives latent_mean \(6, 6, 4\)"),
        (
            (Prepared(3),),
            {"latent_shape": (6, 6)},
            r"latent_mean has the shape \(4, 4, 4\), but .* make latents of 6 x 6",
        ),
        (
            (Numbered(3, noise=True),),
            {"image_shape": (8, 12), "latent_shape": (4, 6)},
            r"noise has the shape \(4, 4, 4\), but pictures of 8 x 12 pixels make latents of 4 x 6; change image_size",
        ),
    ],
)
def test_what_cannot_work_is_told(sources, options, told):
    with pytest.raises(InputError, match=told) as error:
        batches(*sources, **options)
    assert "\n" not in str(error.value)


def test_no_source_at_all():
    with pytest.raises(InputError, match="the data set is empty"):
        train_batches([], tokenize, batch_size=1, image_shape=(8, 8), seed=0)
