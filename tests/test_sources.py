"""Specs and ImageFolder: every kind of picture becomes upright RGB, everything wrong is told in one line."""

import io
import json
import pickle
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from d2f_jax.data import sources
from d2f_jax.data.open import open_source
from d2f_jax.data.sources import ImageFolder, read_image
from d2f_jax.errors import InputError

GRADIENT = np.linspace(0, 255, 8 * 12 * 3).reshape(8, 12, 3).astype(np.uint8)


def write_folder(folder, *lines: object) -> None:
    folder.mkdir(exist_ok=True)
    Image.fromarray(GRADIENT).save(folder / "a.png")
    rows = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")


def test_pictures_and_captions_in_the_order_of_the_lines(tmp_path):
    write_folder(tmp_path, {"file_name": "sub/b.png", "text": "b"}, "", {"file_name": "a.png", "text": "ä", "x": 1})
    (tmp_path / "sub").mkdir()
    Image.fromarray(GRADIENT[::-1]).save(tmp_path / "sub" / "b.png")
    source = pickle.loads(pickle.dumps(ImageFolder(str(tmp_path))))
    assert len(source) == 2
    assert [source[i]["text"] for i in range(2)] == ["b", "ä"]
    np.testing.assert_array_equal(source[0]["image"], GRADIENT[::-1])
    np.testing.assert_array_equal(source[1]["image"], GRADIENT)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1", "YCbCr"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    name = "a.tiff" if mode in ("CMYK", "YCbCr") else "a.png"
    Image.fromarray(GRADIENT).convert(mode).save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.shape == (8, 12, 3) and image.dtype == np.uint8
    if mode != "1":
        assert np.abs(image.mean(-1) - GRADIENT.mean(-1)).mean() < 12


def test_transparency_lies_on_white(tmp_path):
    rgba = np.concatenate([GRADIENT, np.zeros((8, 12, 1), np.uint8)], -1)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == 255).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    values = (np.arange(64, dtype=np.uint16) * 1040).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "a.png")
    np.testing.assert_allclose(read_image(tmp_path / "a.png")[..., 0], values / 257, atol=0.51)


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match="floating-point pixels"):
        read_image(tmp_path / "a.tiff")


def test_links_may_lead_out_as_in_the_hub_cache(tmp_path):
    write_folder(tmp_path / "snapshot", {"file_name": "a.png", "text": "line\u2028separator"})
    (tmp_path / "snapshot" / "a.png").rename(tmp_path / "blob")
    (tmp_path / "snapshot" / "a.png").symlink_to(tmp_path / "blob")
    np.testing.assert_array_equal(ImageFolder(tmp_path / "snapshot")[0]["image"], GRADIENT)


def test_the_camera_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    Image.fromarray(GRADIENT).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(GRADIENT, 3))


@pytest.mark.parametrize(
    "lines, told",
    [
        ([], r"metadata\.jsonl is empty"),
        (["", "  "], r"metadata\.jsonl is empty"),
        ([{"file_name": "a.png", "text": "x"}, "{oops"], r"metadata\.jsonl:2 is not JSON"),
        (["[1, 2]"], r"metadata\.jsonl:1 is not a JSON object"),
        ([{"file_name": "a.png"}], r"metadata\.jsonl:1 has no key 'text'"),
        ([{"text": "x"}], r"metadata\.jsonl:1 has no key 'file_name'"),
        ([{"file_name": "a.png", "text": 3}], r"metadata\.jsonl:1: text must be a string, not 3"),
        ([{"file_name": f"{i}.png", "text": ""} for i in range(9)], r"not there: 0\.png, .* and 4 more"),
        ([{"file_name": "../b.png", "text": "x"}], r"outside its folder: \.\./b\.png"),
        ([{"file_name": "/etc/hostname", "text": "x"}], r"outside its folder: /etc/hostname"),
        ([{"file_name": "metadata.jsonl", "text": "x"}], r"1 of 1 pictures do not open: metadata\.jsonl \(not"),
    ],
)
def test_bad_metadata(tmp_path, lines, told):
    write_folder(tmp_path / "pictures", *lines)
    with pytest.raises(InputError, match=told) as error:
        ImageFolder(tmp_path / "pictures")
    assert "\n" not in str(error.value)


def test_missing_folder_and_missing_metadata(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no metadata\.jsonl"):
        ImageFolder(tmp_path)


def test_metadata_that_is_no_text(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as UTF-8"):
        ImageFolder(tmp_path)


def test_a_truncated_picture_is_named_when_it_is_read(tmp_path):
    write_folder(tmp_path, {"file_name": "a.png", "text": "x"})
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:4000])
    source = ImageFolder(tmp_path)
    with pytest.raises(InputError, match=r"a\.png does not decode") as error:
        source[0]
    assert "\n" not in str(error.value)


def test_what_is_no_file_of_a_picture_format_never_reaches_another_program(tmp_path):
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    with pytest.raises(InputError, match=r"a\.eps does not decode \(not a picture\)"):
        read_image(tmp_path / "a.eps")


def large_png(side: int) -> bytes:
    """A header that claims `side` x `side` pixels, and nothing of them."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 30_000])
def test_a_header_that_claims_too_many_pixels_is_refused_undecoded(tmp_path, side, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(InputError, match=r"^x does not decode \(.*pixels.*\); replace or remove it"):
        read_image(large_png(side), "x")
    with pytest.raises(InputError, match="no encoded picture does not decode"):
        read_image(b"", "no encoded picture")


def test_whatever_a_decoder_raises_is_told(monkeypatch):
    def failing(*args):
        raise struct.error("unpack requires\na buffer")

    monkeypatch.setattr(sources.ImageOps, "exif_transpose", failing)
    file = io.BytesIO()
    Image.fromarray(GRADIENT).save(file, "png")
    with pytest.raises(InputError, match=r"^encoded picture does not decode \(unpack requires a buffer\)"):
        read_image(file.getvalue())


def test_a_line_opens_a_source(tmp_path):
    write_folder(tmp_path / "pictures", {"file_name": "a.png", "text": "x"})
    assert open_source(f"image_folder:{tmp_path / 'pictures'}")[0]["text"] == "x"
    latent, caption = io.BytesIO(), io.BytesIO(b"y")
    np.save(latent, np.ones((4, 2, 2), np.float32))
    with tarfile.open(tmp_path / "00.tar", "w") as tar:
        for name, file in [("1.latent.npy", latent), ("1.txt", caption)]:
            info = tarfile.TarInfo(name)
            info.size = len(file.getvalue())
            file.seek(0)
            tar.addfile(info, file)
    for pattern in ("0?.tar", "{00..00}.tar"):
        example = open_source(f"webdataset:{tmp_path / pattern}?latent_scale=0.5")[0]
        np.testing.assert_array_equal(example["latent_mean"], np.full((2, 2, 4), 2))


def test_a_colour_is_a_picture_and_its_name():
    source = pickle.loads(pickle.dumps(open_source("uniform_colours:black,orange?each=2")))
    assert [source[i]["text"] for i in range(len(source))] == ["a black image", "an orange image"] * 2
    for i, levels in enumerate([(0, 0, 0), (250, 128, 13)] * 2):
        assert (source[i]["image"] == levels).all()


@pytest.mark.parametrize(
    "spec, told",
    [
        (
            "pictures",
            "'pictures' is not of the form kind:path.*; "
            "kinds are array_record, coco, depth_list, hypersim, .*, uniform_colours, vkitti2, webdataset",
        ),
        ("image_folder:", "is not of the form kind:path"),
        ("zip:a", "no kind 'zip'; kinds are array_record, .*, uniform_colours, vkitti2, webdataset"),
        ("uniform_colours:white,pink", "no colour 'pink'; colours are black, blue"),
        ("uniform_colours:white?each=0", "each=0: give 1 picture of each colour, or more"),
        ("image_folder:a?size=3", "no option 'size'; image_folder has none"),
        ("tfds:a?split=x&txt=b", "no option 'txt'; options of tfds are data_dir, image, split, text"),
        ("tfds:a?split=x&split=y", "give the option 'split' one value, once"),
        ("tfds:a?split=", "give the option 'split' one value, once"),
        ("webdataset:a?latent_scale=x", "latent_scale=x is not a number"),
        ("webdataset:/nowhere/{0..1}.tar", r"no shard matches /nowhere/0\.tar"),
        ("image_folder:/nowhere", "/nowhere is not a folder"),
        ("coco:a.json", r"coco:a\.json does not say where its pictures are; add \?images=FOLDER"),
        ("coco:a.json?images=b", r"a\.json cannot be read .* give COCO's captions_val2017\.json"),
        ("array_record:/nowhere", "/nowhere holds no"),
    ],
)
def test_lines_that_open_nothing(spec, told):
    with pytest.raises(InputError, match=told) as error:
        open_source(spec)
    assert "\n" not in str(error.value)


def write_coco(folder, **changes):
    """Two pictures, of which one has two captions, and one that nobody described."""
    (folder / "val").mkdir(parents=True)
    for i in (9, 4, 7):
        Image.fromarray(np.full((20, 30, 3), i, np.uint8)).save(folder / f"val/{i:012d}.png")
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.png"} for i in (9, 4, 7)],
        "annotations": [
            {"id": 30, "image_id": 9, "caption": "later"},
            {"id": 12, "image_id": 4, "caption": "four"},
            {"id": 11, "image_id": 9, "caption": " A dog. \n"},
        ],
    }
    (folder / "captions.json").write_text(json.dumps(content | changes))
    return f"coco:{folder / 'captions.json'}?images={folder / 'val'}"


def test_coco_has_one_caption_for_each_picture(tmp_path):
    source = pickle.loads(pickle.dumps(open_source(write_coco(tmp_path / "coco"))))
    assert [(source[i]["text"], source[i]["image"][0, 0, 0]) for i in range(len(source))] == [
        ("A dog.", 9),
        ("four", 4),
    ]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"annotations": []}, "has no picture with a caption"),
        ({"images": {}}, "has no picture with a caption"),
        ({"images": [{"id": 4}]}, r"does not hold images and annotations .*\('file_name'\)"),
        ({"annotations": [{"id": 1, "image_id": 4}]}, r"does not hold images and annotations .*\('caption'\)"),
        ({"images": [{"id": 4, "file_name": "../a.png"}]}, r"names pictures outside their folder: \.\./a\.png"),
        ({"images": [{"id": 4, "file_name": "b.png"}]}, r"not in \S+val: b\.png; set images to theirs"),
    ],
)
def test_what_is_not_coco(changes, told, tmp_path):
    with pytest.raises(InputError, match=told) as error:
        open_source(write_coco(tmp_path / "coco", **changes))
    assert "\n" not in str(error.value)
