"""WebDataset shards: what they hold, read at random, and everything hostile or broken told in one line."""

import io
import json
import multiprocessing
import pickle
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from d2f_jax.data.loader import train_batches
from d2f_jax.data.open import open_source
from d2f_jax.data.webdataset import WebDataset
from d2f_jax.errors import InputError

RNG = np.random.default_rng(0)
LATENT = RNG.normal(size=(4, 6, 5)).astype(np.float32)


def png(value: int = 7, height: int = 6, width: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(file, "png")
    return file.getvalue()


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def header(magic: bytes = b"\x93NUMPY\x01\x00", **changes) -> bytes:
    """A header of npy with these entries, and 64 bytes."""
    entries = {"descr": "<f4", "fortran_order": False, "shape": (4, 2, 2)} | changes
    text = repr(entries).encode().ljust(117) + b"\n"
    return magic + struct.pack("<H", len(text)) + text + bytes(64)


def write(path, members, **changes) -> str:
    """A tar of (name, content) or of `TarInfo`s."""
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w", **changes) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return str(path)


def pairs(*numbers: int) -> list[tuple[str, bytes]]:
    return [item for n in numbers for item in ((f"{n:04d}.png", png(n)), (f"{n:04d}.txt", str(n).encode()))]


def laion(*notes: dict) -> list[tuple[str, bytes]]:
    """As img2dataset writes it: picture, caption and what it knows of both."""
    parts = [(pairs(n), (f"{n:04d}.json", json.dumps(note).encode())) for n, note in enumerate(notes)]
    return [member for pair, told in parts for member in (*pair, told)]


NOTES = (
    {"AESTHETIC_SCORE": 6.5, "original_width": 512, "caption": "0"},
    {"AESTHETIC_SCORE": 5.9, "original_width": 900, "caption": "1"},
    {"AESTHETIC_SCORE": 7, "original_width": 511, "caption": "2"},
    {"AESTHETIC_SCORE": None, "original_width": 800, "caption": "3"},
    {"AESTHETIC_SCORE": 9.0, "original_width": 800, "caption": "4"},
)


@pytest.mark.parametrize(
    ("bounds", "kept"),
    [
        ({}, "01234"),
        ({"least": "AESTHETIC_SCORE:6"}, "024"),
        ({"least": "AESTHETIC_SCORE:6.5,original_width:512"}, "04"),
        ({"least": "AESTHETIC_SCORE:6", "most": "original_width:512"}, "02"),
        ({"most": "AESTHETIC_SCORE:6"}, "1"),
    ],
)
def test_what_img2dataset_tells_of_examples_bounds_them(bounds, kept, tmp_path):
    write(tmp_path / "shards/0.tar", laion(*NOTES[:3]))
    write(tmp_path / "shards/1.tar", [*laion(*NOTES)[9:], ("0009.json", b"{}")])  # which has nothing beside it
    options = "&".join(f"{name}={value}" for name, value in bounds.items())
    source = open_source(f"webdataset:{tmp_path / 'shards'}{'?' * bool(options)}{options}")
    assert "".join(texts(pickle.loads(pickle.dumps(source)))) == kept


@pytest.mark.parametrize(
    ("notes", "bounds", "told"),
    [
        (NOTES, {"least": "AESTHETIC_SCORE:9.5"}, "no examples, or none within least='AESTHETIC_SCORE:9.5', most=''"),
        (
            NOTES,
            {"least": "aesthetic:6"},
            r"0000\.json tells no aesthetic, .* only AESTHETIC_SCORE, caption, original_w",
        ),
        (NOTES, {"most": "caption:6"}, r"0000\.json has caption='0'; most is of numbers"),
        ((NOTES[0], []), {"most": "original_width:600"}, r"0001\.json tells no original_width, .* only no names"),
        (NOTES, {"least": "AESTHETIC_SCORE"}, "least=AESTHETIC_SCORE is not of the form name:number"),
        (NOTES, {"least": "AESTHETIC_SCORE:nan"}, "least=AESTHETIC_SCORE:nan is not of the form"),
    ],
)
def test_bounds_that_say_nothing(notes, bounds, told, tmp_path):
    shard = write(tmp_path / "0.tar", laion(*notes))
    with pytest.raises(InputError, match=told) as error:
        WebDataset(shard, **bounds)
    assert "\n" not in str(error.value)


def test_bounds_need_what_they_are_of(tmp_path):
    with pytest.raises(InputError, match=r"0\.tar: 0003 has no member json, which least is of; leave that out"):
        WebDataset(write(tmp_path / "0.tar", pairs(3)), least="a:1")
    with pytest.raises(InputError, match=r"1\.tar: 0003\.json is not JSON"):
        WebDataset(write(tmp_path / "1.tar", [*pairs(3), ("0003.json", b"{")]), least="a:1")


def texts(source) -> list[str]:
    return [source[i]["text"] for i in range(len(source))]


def tokenize(captions) -> np.ndarray:
    return np.array([[int(caption)] for caption in captions])


def test_the_published_layout(tmp_path):
    noise = RNG.normal(size=(4, 6, 5)).astype(np.float32)
    members = [
        ("a/000123.image.jpg", b"left unread where there is a latent"),
        ("a/000123.prompt.txt", "eine Kuh, groß\n".encode()),
        ("a/000123.image_latent.npy", npy(LATENT)),
        ("a/000123.noise.npy", npy(noise)),
        ("a/000123.json", b"{}"),
    ]
    source = WebDataset(write(tmp_path / "0.tar", members), latent_scale=0.5)
    assert len(source) == 1
    example = source[0]
    assert set(example) == {"text", "latent_mean", "noise"} and example["text"] == "eine Kuh, groß"
    np.testing.assert_array_equal(example["latent_mean"], (LATENT.transpose(1, 2, 0) / 0.5).astype(np.float16))
    np.testing.assert_array_equal(example["noise"], noise.transpose(1, 2, 0))
    assert example["latent_mean"].dtype == np.float16 and example["noise"].dtype == np.float32


@pytest.mark.parametrize("extension", ["jpg", "image.jpg", "jpeg", "image.png", "WEBP", "Image.JPG"])
def test_pictures_with_depth(tmp_path, extension):
    depth = RNG.uniform(size=(1, 6, 8)).astype(np.float16)
    members = [(f"x.{extension}", png(9)), ("x.txt", b"a"), ("x.depth.npy", npy(depth))]
    example = WebDataset(write(tmp_path / "0.tar", members))[0]
    np.testing.assert_array_equal(example["image"], np.full((6, 8, 3), 9))
    np.testing.assert_array_equal(example["depth"], depth[0].astype(np.float32))


def test_depth_that_is_not_positive_and_finite_becomes_0(tmp_path):
    depth, mask = np.arange(48, dtype=np.float32).reshape(6, 8), np.ones((1, 6, 8), bool)
    wanted = depth.copy()
    depth[1, 1:5], wanted[1, 1:5] = (np.nan, np.inf, -np.inf, -2), 0
    mask[0, 4], wanted[4] = False, 0
    members = [("x.png", png()), ("x.depth.npy", npy(depth)), ("x.valid_mask.npy", npy(mask))]
    example = WebDataset(write(tmp_path / "0.tar", members))[0]
    np.testing.assert_array_equal(example["depth"], wanted)
    assert example["text"] == "" and example["depth"].dtype == np.float32


def test_latents_of_depth_are_learned_and_their_pictures_shown(tmp_path):
    members = [("x.depth_latent.npy", npy(LATENT)), ("x.image_latent.npy", npy(2 * LATENT)), ("x.image.png", b"")]
    source = WebDataset(write(tmp_path / "0.tar", members), latent_scale=0.5)
    example, latent = source[0], (LATENT.transpose(1, 2, 0) / 0.5).astype(np.float16)
    assert set(example) == {"text", "latent_mean", "picture_mean", "valid"} and example["text"] == ""
    np.testing.assert_array_equal(example["latent_mean"], latent)
    np.testing.assert_array_equal(example["picture_mean"], 2 * latent)
    assert example["valid"].dtype == bool and example["valid"].shape == (6, 5) and example["valid"].all()
    options = {"batch_size": 1, "image_shape": (48, 40), "latent_shape": (6, 5), "seed": 0}
    batch = next(train_batches([source], lambda captions: np.zeros((len(captions), 1)), **options, depth=True))
    np.testing.assert_array_equal(batch["picture_mean"][0], 2 * latent)
    with pytest.raises(InputError, match="the latents are of depth"):
        train_batches([source], tokenize, **options)
    alone = WebDataset(write(tmp_path / "1.tar", members[:1]), latent_scale=1)
    with pytest.raises(InputError, match=r"x has a latent of depth, and none of its picture; add image_latent\.npy"):
        alone[0]


@pytest.mark.parametrize("name, factor", [("valid_mask", 1), ("valid_mask", 8), ("depth", 8), ("depth", 1)])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_patches_of_depth_that_are_known_as_a_whole_are_valid(tmp_path, name, factor, dtype):
    known = np.ones((6 * factor, 5 * factor), np.float32 if name == "depth" else dtype)
    wanted = np.ones((6, 5), bool)
    known[3 * factor, 5 * factor - 1] = np.nan if name == "depth" else 0
    wanted[3, 4] = False
    latents = [("x.depth_latent.npy", npy(LATENT)), ("x.image_latent.npy", npy(LATENT))]
    source = WebDataset(write(tmp_path / "0.tar", [*latents, (f"x.{name}.npy", npy(known))]), latent_scale=1)
    np.testing.assert_array_equal(source[0]["valid"], wanted)


@pytest.mark.parametrize("stored", [LATENT, LATENT.transpose(1, 2, 0), np.asfortranarray(LATENT), LATENT.astype("f2")])
def test_latents_come_with_channels_first_or_last(tmp_path, stored):
    members = [("x.latent.npy", npy(stored)), ("x.txt", b"a")]
    latent = WebDataset(write(tmp_path / "0.tar", members), latent_scale=1)[0]["latent_mean"]
    np.testing.assert_allclose(latent, LATENT.transpose(1, 2, 0), rtol=1e-3)


def test_members_of_an_example_need_not_be_neighbours_and_others_are_left_alone(tmp_path):
    folder = tarfile.TarInfo("b.c")
    folder.type = tarfile.DIRTYPE
    members = [*pairs(1)[:1], folder, ("README", b""), (".hidden.txt", b""), ("b.c/1.txt", b"2"), *pairs(1)[1:]]
    source = WebDataset(write(tmp_path / "0.tar", [*members, ("b.c/1.png", png())]))
    assert texts(source) == ["1", "2"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, format):
    key = "ordner/" * 15 + "größe"
    members = [(f"{key}.{name}", content) for name, content in [("txt", b"a"), ("png", png())]]
    assert texts(WebDataset(write(tmp_path / "0.tar", members, format=format, encoding="utf-8"))) == ["a"]


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("", [0, 1, 2, 3, 4, 5]),
        ("0.tar", [0, 1]),
        ("*.tar", [0, 1, 2, 3, 4, 5]),
        ("[12].tar", [2, 3, 4, 5]),
        ("{0..1}.tar", [0, 1, 2, 3]),
        ("{1..1}*.tar", [2, 3]),
    ],
)
def test_patterns(tmp_path, pattern, expected):
    for shard in (2, 0, 1):
        write(tmp_path / f"{shard}.tar", pairs(2 * shard, 2 * shard + 1))
    assert texts(WebDataset(tmp_path / pattern)) == [str(n) for n in expected]


def test_ranges_keep_their_zeros_and_multiply(tmp_path):
    for name, number in [("a08/0", 1), ("a08/1", 2), ("a10/0", 3), ("a10/1", 4), ("a09/0", 5), ("a09/1", 6)]:
        write(tmp_path / f"{name}.tar", pairs(number))
    assert texts(WebDataset(tmp_path / "a{08..10}" / "{0..1}.tar")) == ["1", "2", "5", "6", "3", "4"]


def read_in_process(source, queue) -> None:
    queue.put(texts(source))


def test_pickles_and_reads_in_another_process(tmp_path):
    source = WebDataset(write(tmp_path / "0.tar", pairs(1, 2, 3)))
    assert texts(pickle.loads(pickle.dumps(source))) == texts(source)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=read_in_process, args=(source, queue))
    process.start()
    assert queue.get(timeout=60) == ["1", "2", "3"]
    process.join()


def test_one_shard_feeds_four_processes(tmp_path):
    source = WebDataset(write(tmp_path / "0.tar", pairs(*range(8))))
    options = {"batch_size": 8, "image_shape": (6, 6), "seed": 0}
    parts = [train_batches([source], tokenize, **options, rows=[p, p + 4]) for p in range(4)]
    for _ in range(3):
        seen = np.concatenate([next(part)["input_ids"][:, 0] for part in parts])
        assert sorted(seen) == list(range(8))


def test_an_empty_shard_among_others_adds_nothing(tmp_path):
    write(tmp_path / "0.tar", [])
    write(tmp_path / "1.tar", pairs(1))
    assert texts(WebDataset(tmp_path)) == ["1"]


def refused(path, told: str, **options) -> None:
    with pytest.raises(InputError, match=told) as error:
        WebDataset(path, **options)
    assert "\n" not in str(error.value)


def test_no_shards(tmp_path):
    refused(tmp_path / "nowhere", "no shard matches .*nowhere; give a folder")
    refused(tmp_path, r"no shard matches .*\*\.tar")
    write(tmp_path / "00.tar", pairs(1))
    refused(tmp_path / "{00..02}.tar", r"no shard matches .*01\.tar")
    refused(tmp_path / "{02..00}.tar", r"the range \{02\.\.00\} runs backwards; write \{00\.\.02\}")


def test_no_examples(tmp_path):
    refused(write(tmp_path / "0.tar", []), r"0\.tar holds no examples; members are named as in 000123\.jpg")
    refused(write(tmp_path / "1.tar", [("README.md", b"")]), r"1\.tar holds no examples")


@pytest.mark.parametrize("kept", [1, 511, 513, 700, 1024, 1500, 2048, 2049])
def test_a_shard_that_is_cut_short_is_refused(tmp_path, kept):
    path = tmp_path / "0.tar"
    write(path, pairs(1))
    path.write_bytes(path.read_bytes()[:kept])
    refused(path, r"0\.tar is (cut short|no whole tar file).*byte \d+.*; copy it again")


def test_a_shard_that_is_damaged_in_the_middle_is_refused(tmp_path):
    path = tmp_path / "0.tar"
    write(path, pairs(1, 2))
    content = bytearray(path.read_bytes())
    content[1024:1536] = b"\xff" * 512  # the second header
    path.write_bytes(content)
    refused(path, r"0\.tar is damaged: no member begins at byte 1024; copy it again")


def test_files_that_are_no_tar(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(b"")
    refused(path, r"0\.tar is empty, 0 bytes; write it anew or remove it")
    path.write_bytes(RNG.bytes(5000))
    refused(path, r"0\.tar is no whole tar file: byte 0: .*; copy it again")
    for mode, name in [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")]:
        with tarfile.open(path, mode):
            pass
        refused(path, rf"0\.tar is compressed \({name}\), which has no random access; unpack it to a plain tar")


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7])
def test_a_false_size_neither_hangs_nor_allocates(tmp_path, size):
    path = tmp_path / "0.tar"
    write(path, pairs(1))
    content = bytearray(path.read_bytes())
    content[124:136] = size
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content[:512])
    path.write_bytes(content)
    refused(path, r"0\.tar( is|: '0001\.png' is)")


@pytest.mark.parametrize("name", ["/etc/x.png", "../x.png", "a/../../x.png"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    refused(write(tmp_path / "0.tar", [*pairs(1), (name, png())]), r"the name '.*x\.png' leads out of the shard")


def test_names_that_do_not_print_are_refused(tmp_path):
    path = write(tmp_path / "0.tar", [("x\n\udcff.png", png())], format=tarfile.GNU_FORMAT)
    refused(path, r"the name 'x\\n.*\.png' holds characters that do not print")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    info = tarfile.TarInfo("0001.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    refused(write(tmp_path / "0.tar", [info, ("0001.txt", b"a")]), r"'0001\.jpg' is a link, device or other member")


@pytest.mark.parametrize("second", ["0001.png", "0001.jpg", "0001.image.webp"])
def test_two_pictures_of_one_example_are_refused(tmp_path, second):
    told = rf"holds two members for image of 0001: 0001\.png and {second}; keep one"
    refused(write(tmp_path / "0.tar", [*pairs(1), (second, png())]), told)


def test_two_latents_of_one_example_are_refused(tmp_path):
    members = [("1.image_latent.npy", b""), ("1.latent.npy", b"")]
    told = r"two members for latent of 1: 1\.image_latent\.npy and 1\.latent\.npy; name one, as latent=image_latent"
    refused(write(tmp_path / "0.tar", members), told)


def test_one_of_several_latents_is_taken_by_its_name(tmp_path):
    members = [("1.txt", b"x"), ("1.image_latent.npy", npy(LATENT)), ("1.Flipped_latent.npy", npy(2 * LATENT))]
    shard = write(tmp_path / "0.tar", [*members, ("1.latent.npy", npy(3 * LATENT))])
    for name, times in (("image_latent", 1), ("Flipped_latent", 2), ("latent", 3)):
        example = open_source(f"webdataset:{shard}?latent_scale=1&latent={name}")[0]
        np.testing.assert_array_equal(example["latent_mean"], (times * LATENT.transpose(1, 2, 0)).astype(np.float16))
    refused(shard, "latent=small_latent: .*0.tar has no member small_latent.npy", latent="small_latent")


def test_the_scale_of_latents_is_never_guessed(tmp_path):
    latents = write(tmp_path / "0.tar", [("x.latent.npy", npy(LATENT)), ("x.txt", b"a")])
    refused(latents, r"0\.tar holds latents; say what they were multiplied by: latent_scale=0\.18215")
    for scale in (0, -1, np.nan, np.inf):
        refused(latents, r"latent_scale=\S+ must be positive", latent_scale=scale)
    refused(write(tmp_path / "2.tar", [("x.depth_latent.npy", npy(LATENT))]), "holds latents; say what they were")
    refused(write(tmp_path / "1.tar", pairs(1)), "latent_scale=1 is for latents, and .* holds none", latent_scale=1)


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in 60 bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    start = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


NOISE_JPG = io.BytesIO()
Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(NOISE_JPG, "jpeg")

DAMAGED = {
    "no caption": ([("x.png", png())], r"x has no caption; add a member prompt\.txt or txt"),
    "no picture": ([("x.txt", b"a")], r"x has no picture and no latent; add a member image\.jpg or jpg"),
    "caption in latin-1": ([("x.png", png()), ("x.txt", "größe".encode("latin-1"))], "the caption is not UTF-8"),
    "empty picture": ([("x.jpg", b""), ("x.txt", b"a")], r"x: the picture does not decode \(not a picture\)"),
    "no jpg": ([("x.jpg", RNG.bytes(900)), ("x.txt", b"a")], r"x: the picture does not decode \(not a picture\)"),
    "half a jpg": (
        [("x.jpg", NOISE_JPG.getvalue()[:2000]), ("x.txt", b"a")],
        r"x: the picture does not decode \(image file is truncated",
    ),
    "a bomb": ([("x.png", bomb()), ("x.txt", b"a")], r"x: the picture does not decode \(.*900000000 pixels"),
    "depth of other rank": (
        [("x.png", png()), ("x.txt", b"a"), ("x.depth.npy", npy(np.ones((2, 6, 8), np.float32)))],
        r"x: the depth has the shape \(2, 6, 8\), wanted are \(H, W\)",
    ),
    "depth of other size": (
        [("x.png", png()), ("x.txt", b"a"), ("x.depth.npy", npy(np.ones((6, 9), np.float32)))],
        r"the depth has the shape \(6, 9\), its picture \(6, 8\)",
    ),
    "depth with a mask of other size": (
        [
            ("x.png", png()),
            ("x.depth.npy", npy(np.ones((6, 8), np.float32))),
            ("x.valid_mask.npy", npy(np.ones((6, 9)))),
        ],
        r"the valid mask has the shape \(6, 9\), no multiple of \(6, 8\); make it of that size",
    ),
    "depth with a mask of text": (
        [("x.png", png()), ("x.depth.npy", npy(np.ones((6, 8), np.float32))), ("x.valid_mask.npy", npy(np.array("a")))],
        "the valid mask holds <U1, wanted is numbers or booleans",
    ),
}
BAD_ARRAYS = {
    "integers": (npy(LATENT.astype(int)), "x: the latent holds int64, wanted is floating point"),
    "objects": (npy(np.array([{}, []], object)), "x: the latent holds object, wanted is floating point"),
    "records": (npy(np.zeros(3, [("a", "f4")])), "x: the latent holds .* wanted is floating point"),
    "other channels": (npy(np.ones((3, 6, 5), np.float32)), r"x: the latent has the shape \(3, 6, 5\), wanted are"),
    "other rank": (npy(np.ones((1, 4, 6, 5), np.float32)), r"the latent has the shape \(1, 4, 6, 5\), wanted are"),
    "nan": (npy(np.full((4, 2, 2), np.nan, np.float32)), "the latent holds values that are no finite"),
    "too large for half precision": (npy(np.full((4, 2, 2), 1e5, np.float32)), "the latent holds values that are no f"),
    "empty": (b"", "x: the latent is no npy file"),
    "text": (b"hello, this is no array", "x: the latent is no npy file"),
    "cut short": (npy(LATENT)[:-1], r"x: the latent has 479 bytes, not those of \(4, 6, 5\) float32"),
    "a false shape": (header(shape=(4, 1 << 40, 1 << 40)), "x: the latent has 64 bytes, not those of"),
    "a negative shape": (header(shape=(-4, -2, 2)), r"x: the latent has"),
    "code in the header": (header(descr="__import__('os')"), "x: the latent is no npy file"),
    "another version": (header(b"\x93NUMPY\x09\x00"), "x: the latent is no npy file"),
}
for name, (content, told) in BAD_ARRAYS.items():
    DAMAGED[name] = ([("x.latent.npy", content), ("x.txt", b"a")], told)


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_of_one_example_stops_or_is_skipped_by_name(tmp_path, name):
    members, told = DAMAGED[name]
    latents = any("latent" in member for member, _ in members)
    good = [("good.txt", b"1"), ("good.latent.npy", npy(np.ones((4, 2, 2), np.float32)))] if latents else pairs(1)
    if "depth" in name:
        good.append(("0001.depth.npy", npy(np.ones((6, 8), np.float32))))
    path = write(tmp_path / "0.tar", [*good, *members])
    source = WebDataset(path, latent_scale=1 if latents else None)
    options = {"batch_size": 2, "image_shape": (6, 6), "seed": 0, "depth": "depth" in name}
    with pytest.raises(InputError, match=told) as error:
        next(train_batches([source], tokenize, **options))
    assert "\n" not in str(error.value) and str(error.value).startswith("example 1: ")
    batch = next(train_batches([source], lambda captions: np.zeros((len(captions), 1)), **options, on_damage="skip"))
    assert sorted(batch["weight"]) == [0, 1]
    assert batch["damaged"] == (str(error.value),)
    array = batch["latent_mean" if latents else "image"]
    assert (array[batch["weight"] == 0] == 0).all() and (array[batch["weight"] == 1] != 0).all()


def test_a_shard_that_shrinks_while_it_is_used(tmp_path):
    path = tmp_path / "0.tar"
    source = WebDataset(write(path, pairs(1, 2)))
    path.write_bytes(path.read_bytes()[:2100])
    assert source[0]["text"] == "1"
    with pytest.raises(InputError, match=r"0\.tar ends within the"):
        source[1]
    path.unlink()
    with pytest.raises(OSError, match=r"0\.tar"):
        source[0]


def test_a_scale_that_makes_latents_too_large_is_damage(tmp_path):
    source = WebDataset(write(tmp_path / "0.tar", [("x.latent.npy", npy(LATENT)), ("x.txt", b"a")]), latent_scale=1e-6)
    with pytest.raises(InputError, match="the latent holds values that are no finite half-precision numbers"):
        source[0]
