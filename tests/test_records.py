"""Records: bit for bit, at random over several files, and damage is named instead of handed out."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2f_jax.data import records
from d2f_jax.data.records import Shards
from d2f_jax.errors import InputError, SaveError

COUNTS = (5, 0, 3, 7)


def example(i: int) -> dict:
    rng = np.random.default_rng(i)
    return {
        "text": f"№ {i}, a cube" if i else "",
        "latent_mean": rng.normal(size=(8, 8, 4)).astype(np.float16),
        "text_states": rng.normal(size=(5, 16)).astype(np.float16),
        "noise": rng.normal(size=(8, 8, 4)).astype(np.float32),
        "depth": rng.normal(size=(6, 7)).astype(np.float32),
    }


def assert_same(ours, theirs) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, str):
            assert ours[name] == value
        else:
            assert ours[name].dtype == value.dtype
            np.testing.assert_array_equal(ours[name], value)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{shard}.array_record" for shard in range(len(COUNTS))]
    numbers = iter(range(sum(COUNTS)))
    for file, count in zip(files, COUNTS, strict=True):
        assert records.write_shard(file, (records.encode(example(next(numbers))) for _ in range(count))) == count
    assert sorted(tmp_path.iterdir()) == files
    return files


@pytest.mark.parametrize("i", [0, 1])
def test_what_is_encoded_comes_back(i: int) -> None:
    assert_same(records.decode(records.encode(example(i))), example(i))


def test_pictures_are_decoded() -> None:
    pixels = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "png")
    record = records.encode({"image": encoded.getvalue(), "text": "x"})
    assert_same(records.decode(record), {"image": pixels, "text": "x"})
    with pytest.raises(InputError, match="place 3 does not decode"):
        records.decode(records.encode({"image": encoded.getvalue()[:40], "text": "x"}), "place 3")


def test_a_name_that_is_not_known() -> None:
    with pytest.raises(ValueError, match="a record holds no latents, only depth, image, "):
        records.encode({"text": "", "latents": np.zeros(3)})


@pytest.mark.parametrize("record", [b"", b"nonsense", records.encode({"text": "x"})[:-1], records.encode({})])
def test_what_is_no_record(record: bytes) -> None:
    with pytest.raises(InputError, match="file 7 is no example"):
        records.decode(record, "file 7")


def test_random_access_over_files(files: list[Path]) -> None:
    for shards in (Shards(files, COUNTS), pickle.loads(pickle.dumps(Shards(files, COUNTS)))):
        assert len(shards) == 15
        for i in np.random.default_rng(0).permutation(15):
            assert_same(shards[int(i)], example(int(i)))
        for outside in (-1, 15, 10**12):
            with pytest.raises(IndexError, match=f"example {outside} of 15"):
                shards[outside]


def test_more_files_than_are_kept_open(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_OPEN_FILES", 1)
    shards = Shards(files, COUNTS)
    for i in (0, 14, 5, 1):
        assert_same(shards[i], example(i))


def test_one_flipped_bit_is_told_of_the_record_alone(files: list[Path]) -> None:
    content = bytearray(files[2].read_bytes())
    place = content.index("№ 6".encode())
    content[place] ^= 1
    files[2].write_bytes(content)
    shards = Shards(files, COUNTS)
    with pytest.raises(InputError, match=rf"{files[2].name}: record 1 is damaged") as error:
        shards[6]
    assert "\n" not in str(error.value)
    assert_same(shards[5], example(5))
    assert_same(shards[7], example(7))


@pytest.mark.parametrize("size", [0, 100, 65_536, 70_000, -1])
def test_a_file_that_breaks_off_is_named(files: list[Path], size: int) -> None:
    files[3].write_bytes(files[3].read_bytes()[:size])
    with pytest.raises(InputError, match=rf"{files[3].name} is damaged \(0 of 7 records\)"):
        Shards(files, COUNTS)[10]


def test_a_file_with_other_records_or_none(files: list[Path]) -> None:
    with pytest.raises(InputError, match=r"0\.array_record is damaged \(5 of 4 records\)"):
        Shards(files[:1], [4])[0]
    files[0].unlink()
    with pytest.raises(InputError, match=r"0\.array_record is damaged \(missing\)"):
        Shards(files[:1], [5])[0]


def test_what_is_not_whole_is_not_there(tmp_path: Path) -> None:
    def failing():
        yield records.encode(example(0))
        raise InputError("example 1 is damaged")

    with pytest.raises(InputError, match="example 1"):
        records.write_shard(tmp_path / "a", failing())
    assert not list(tmp_path.iterdir())
    with pytest.raises(SaveError, match="nowhere/a cannot be written") as error:
        records.write_shard(tmp_path / "nowhere" / "a", [b"x"])
    assert "\n" not in str(error.value)


def test_a_file_is_a_function_of_its_records(tmp_path: Path) -> None:
    content = [records.encode(example(i)) for i in range(50)]
    for name in "ab":
        records.write_shard(tmp_path / name, content)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert records.checksum(tmp_path / "a") == records.checksum(tmp_path / "b") != 0
