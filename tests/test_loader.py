"""The loader: reproducible, resumable, the same global batch for any number of processes and workers."""

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from d2f_jax.data.loader import fit_image, train_batches
from d2f_jax.errors import InputError


class Numbered:
    """Example i is a picture of the grey level i, brighter to the right, with the caption `i`."""

    def __init__(self, count: int, size: int = 8):
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        if index >= self.count:
            raise IndexError(index)
        row = np.arange(self.size, dtype=np.uint8) + index
        return {"image": np.broadcast_to(row[None, :, None], (self.size, self.size, 3)), "text": str(index)}


class Damaged(Numbered):
    def __getitem__(self, index: int):
        raise InputError("x.png does not decode")


def tokenize(texts) -> np.ndarray:
    """The caption's number in two equal tokens; -1 for the empty caption."""
    return np.array([[int(text or -1)] * 2 for text in texts])


def batches(source=None, **changes):
    options = {"batch_size": 4, "image_size": 8, "seed": 5}
    return train_batches(Numbered(10) if source is None else source, tokenize, **{**options, **changes})


def ids(iterator, steps: int) -> list[list[int]]:
    return [next(iterator)["input_ids"][:, 0].tolist() for _ in range(steps)]


def assert_same(a, b) -> None:
    np.testing.assert_array_equal(a["image"], b["image"])
    np.testing.assert_array_equal(a["input_ids"], b["input_ids"])


def test_a_batch_has_the_promised_shapes_and_range():
    batch = next(batches(Numbered(10, size=8), image_size=4))
    assert batch["image"].shape == (4, 4, 4, 3) and batch["image"].dtype == np.float32
    assert batch["input_ids"].shape == (4, 2) and batch["input_ids"].dtype == np.int32
    black_and_white = next(
        batches([{"image": np.array([[[0] * 3, [255] * 3]] * 2, np.uint8), "text": "1"}], image_size=2)
    )
    assert black_and_white["image"].min() == -1 and black_and_white["image"].max() == 1


def test_pictures_keep_their_captions():
    for _, batch in zip(range(5), batches(), strict=False):
        np.testing.assert_allclose((batch["image"][:, 0, 0, 0] + 1) * 127.5, batch["input_ids"][:, 0], atol=1e-3)


def test_every_epoch_holds_everything_once_in_another_order():
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


@pytest.mark.parametrize("count", [2, 4])
def test_the_processes_share_the_global_batch(count):
    options = {"batch_size": 8, "random_flip": True, "caption_dropout": 0.3}
    whole = batches(**options)
    parts = [batches(**options, process_index=p, process_count=count) for p in range(count)]
    for _ in range(4):
        one, many = next(whole), [next(part) for part in parts]
        for p, share in enumerate(many):
            assert_same(share, {key: value[p::count] for key, value in one.items()})


def test_resumes_in_the_middle_of_an_epoch_through_orbax(tmp_path):
    options = {"random_flip": True, "caption_dropout": 0.3}
    straight, interrupted = batches(**options), batches(**options)
    for _ in range(3):
        next(straight), next(interrupted)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(interrupted)))
        manager.wait_until_finished()
        resumed = batches(**options)
        manager.restore(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    for _ in range(5):
        assert_same(next(straight), next(resumed))


def test_worker_processes_change_nothing():
    options = {"random_flip": True, "caption_dropout": 0.3}
    alone, helped = batches(**options), batches(**options, num_workers=2)
    for _ in range(4):
        assert_same(next(alone), next(helped))
    helped.close()


def test_a_worker_passes_on_what_is_wrong():
    iterator = batches(Damaged(5), num_workers=1)
    with pytest.raises(InputError, match=r"x\.png does not decode"):
        next(iterator)
    iterator.close()


def test_captions_drop_and_pictures_flip_as_often_as_asked():
    batch = next(batches(batch_size=300, caption_dropout=0.2, random_flip=True))
    assert np.mean(batch["input_ids"][:, 0] == -1) == pytest.approx(0.2, abs=0.07)
    flipped = batch["image"][:, 0, 0, 0] > batch["image"][:, 0, -1, 0]
    assert flipped.mean() == pytest.approx(0.5, abs=0.09)
    plain = next(batches(batch_size=300))
    assert not (plain["image"][:, 0, 0, 0] > plain["image"][:, 0, -1, 0]).any()
    assert (plain["input_ids"] >= 0).all()


def test_one_knob_leaves_the_other_alone():
    flipped = next(batches(batch_size=40, random_flip=True))["image"]
    np.testing.assert_array_equal(flipped, next(batches(batch_size=40, random_flip=True, caption_dropout=0.5))["image"])


@pytest.mark.parametrize("height, width", [(8, 8), (20, 36), (33, 15), (5, 9)])
def test_fitting_cuts_out_the_centre(height, width):
    columns = np.abs(np.arange(width) - (width - 1) / 2)
    image = np.broadcast_to((columns * 255 / columns.max())[None, :, None], (height, width, 3)).astype(np.uint8)
    fitted = fit_image(image, 8)
    assert fitted.shape == (8, 8, 3)
    assert np.abs(fitted.astype(int) - fitted[:, ::-1]).max() <= 1  # the middle stays the middle
    np.testing.assert_array_equal(fit_image(np.full((height, width, 3), 77, np.uint8), 8), 77)


def test_fitting_does_not_alias():
    stripes = np.broadcast_to((np.arange(64) % 2 * 255)[None, :, None], (64, 64, 3)).astype(np.uint8)
    assert np.abs(fit_image(stripes, 8)[:, 1:-1].astype(int) - 127).max() <= 12


def test_what_cannot_work_is_told():
    with pytest.raises(InputError, match="the data set is empty"):
        batches([])
    with pytest.raises(InputError, match="batch_size=6 does not divide over 4 processes"):
        batches(batch_size=6, process_count=4)
