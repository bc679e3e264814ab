"""Benchmarks of depth from lists of files, in the formats that Marigold prepares them in."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2f_jax.data.depth_lists import FORMATS, DepthList
from d2f_jax.data.open import open_source
from d2f_jax.errors import InputError
from d2f_jax.metrics import DEPTH_PROTOCOLS

RNG = np.random.default_rng(0)
SIZE = (6, 8)


def written(root: Path, *lines: str) -> Path:
    """A list of these lines, with a grey picture for every first word."""
    for line in lines:
        if line.strip():
            file = root / line.split()[0]
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((*SIZE, 3), 90, np.uint8)).save(file)
    (root / "list.txt").write_text("\n".join(lines) + "\n")
    return root / "list.txt"


def depth_of(file: Path, protocol: str, index: int = 0) -> np.ndarray:
    source = pickle.loads(pickle.dumps(open_source(f"depth_list:{file}?protocol={protocol}")))
    example = source[index]
    assert example["text"] == "" and example["image"].shape == (*SIZE, 3) and example["depth"].dtype == np.float32
    return example["depth"]


def test_every_benchmark_s_files_are_known() -> None:
    assert FORMATS.keys() == DEPTH_PROTOCOLS.keys() - {"all"}


@pytest.mark.parametrize(
    ("protocol", "units"), [("nyuv2", 1000), ("scannet", 1000), ("kitti", 256), ("kitti_garg", 256)]
)
def test_16_bits_become_metres(tmp_path: Path, protocol: str, units: int) -> None:
    file = written(tmp_path, "test/kitchen/rgb_1.png test/kitchen/depth_1.png test/kitchen/filled_1.png")
    stored = RNG.integers(0, 1 << 16, SIZE, np.uint16)
    stored[0, :3] = 0, 1, 65535
    Image.fromarray(stored).save(tmp_path / "test/kitchen/depth_1.png")
    np.testing.assert_allclose(depth_of(file, protocol), stored / units, rtol=1e-6)


def test_eth3d_is_plain_float32_of_pictures_as_they_are_stored(tmp_path: Path) -> None:
    file = written(tmp_path, "rgb/DSC_1.JPG depth/DSC_1.JPG")
    turned = Image.Exif()
    turned[0x0112] = 6  # held upright by the camera
    Image.fromarray(np.full((*SIZE, 3), 90, np.uint8)).save(tmp_path / "rgb/DSC_1.JPG", exif=turned)
    depth = RNG.uniform(0.1, 30, SIZE).astype("<f4")
    wanted = depth.copy()
    depth[2, :3], wanted[2, :3] = (np.inf, np.nan, -1), 0
    (tmp_path / "depth").mkdir()
    depth.tofile(tmp_path / "depth/DSC_1.JPG")
    np.testing.assert_array_equal(depth_of(file, "eth3d"), wanted)
    (tmp_path / "depth/DSC_1.JPG").write_bytes(depth.tobytes()[:-1])
    with pytest.raises(InputError, match=r"DSC_1\.JPG has 191 bytes, not those of 6 x 8 float32 as its picture; repl"):
        depth_of(file, "eth3d")


def test_diode_is_npy_with_a_mask(tmp_path: Path) -> None:
    file = written(tmp_path, "indoors/1.png indoors/1_depth.npy indoors/1_depth_mask.npy")
    depth, mask = RNG.uniform(0.6, 300, (*SIZE, 1)).astype(np.float32), RNG.integers(0, 2, SIZE).astype(float)
    np.save(tmp_path / "indoors/1_depth.npy", depth)
    np.save(tmp_path / "indoors/1_depth_mask.npy", mask)
    np.testing.assert_array_equal(depth_of(file, "diode"), depth[..., 0] * mask)
    np.save(tmp_path / "indoors/1_depth_mask.npy", mask.T)
    with pytest.raises(InputError, match=r"1_depth_mask\.npy has the shape \(8, 6\), its picture \(6, 8\); replace"):
        depth_of(file, "diode")
    (tmp_path / "indoors/1_depth.npy").write_bytes(b"no npy")
    with pytest.raises(InputError, match=r"1_depth\.npy is no npy file"):
        depth_of(file, "diode")


def test_lines_without_depth_are_left_out_and_the_root_may_be_elsewhere(tmp_path: Path) -> None:
    root = tmp_path / "data"
    lines = [f"{i}.png {'None' if i == 1 else f'{i}_depth.png'} 721.5377" for i in range(3)]
    (written(root, lines[0], "", *lines[1:])).rename(tmp_path / "eigen.txt")
    for i in (0, 2):
        Image.fromarray(np.full(SIZE, 256 * (i + 1), np.uint16)).save(root / f"{i}_depth.png")
    source = open_source(f"depth_list:{tmp_path / 'eigen.txt'}?root={root}&protocol=kitti")
    assert [float(source[i]["depth"].mean()) for i in range(len(source))] == [1, 3]


@pytest.mark.parametrize(
    ("line", "protocol", "told"),
    [
        ("a.png a_depth.png", None, r"protocol=None must tell how depth is stored: one of nyuv2, kitti, "),
        ("a.png a_depth.png", "all", r"protocol=all must tell how depth is stored: one of nyuv2, kitti, "),
        ("a.png", "nyuv2", r"list\.txt:1 names 1 files; wanted are picture and depth"),
        ("a.png a_depth.npy", "diode", r"list\.txt:1 names 2 files; wanted are picture, depth and mask"),
        ("", "nyuv2", r"list\.txt names no pictures; write one line for each"),
        ("a.png None 721.5", "kitti", r"list\.txt names no pictures"),
        ("a.png ../a_depth.png", "nyuv2", r"names files outside its root: \.\./a_depth\.png; move them inside"),
        ("a.png /a_depth.png", "nyuv2", r"names files outside its root: /a_depth\.png"),
        ("a.png a_depth.png", "nyuv2", r"names files that are not below .*: a_depth\.png; set root to where they are"),
    ],
)
def test_what_cannot_be_meant_is_told(tmp_path: Path, line: str, protocol: str | None, told: str) -> None:
    with pytest.raises(InputError, match=told) as error:
        DepthList(written(tmp_path, line), protocol=protocol)
    assert "\n" not in str(error.value)


def test_lists_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\xff")
    for file in (tmp_path / "nowhere.txt", tmp_path / "list.txt", tmp_path):
        with pytest.raises(InputError, match="cannot be read as a list of files"):
            DepthList(file, protocol="nyuv2")


@pytest.mark.parametrize("content", [b"", b"no PNG", np.ones(SIZE, np.uint8), np.ones((6, 9), np.uint16)])
def test_damaged_files_are_named(tmp_path: Path, content: bytes | np.ndarray) -> None:
    file = written(tmp_path, "1.png 1_depth.png")
    if isinstance(content, bytes):
        (tmp_path / "1_depth.png").write_bytes(content)
    else:
        Image.fromarray(content).save(tmp_path / "1_depth.png")
    with pytest.raises(InputError, match=r"1_depth\.png cannot be read \(.+\); replace or remove it"):
        DepthList(file, protocol="nyuv2")[0]
