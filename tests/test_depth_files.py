"""Depth of Hypersim and Virtual KITTI 2, from files as they come, and the law by which depth is learned."""

import importlib.util
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from d2f_jax.data.depth import distance_to_depth, normalised
from d2f_jax.data.depth_files import Hypersim, VirtualKitti2
from d2f_jax.data.open import open_source
from d2f_jax.errors import InputError

HEADER = "scene_name,camera_name,frame_id,included_in_public_release,exclude_reason,split_partition_name"
LIST = "metadata_images_split_scene_v1.csv"
SIZE = (12, 16)


def hypersim_files(
    folder: Path, scene: str = "ai_001_001", camera: str = "cam_00", frame: int = 0
) -> tuple[Path, Path]:
    images = folder / scene / "images"
    return (
        images / f"scene_{camera}_final_preview" / f"frame.{frame:04d}.tonemap.jpg",
        images / f"scene_{camera}_geometry_hdf5" / f"frame.{frame:04d}.depth_meters.hdf5",
    )


def write_hypersim(files: tuple[Path, Path], distance_HxW: np.ndarray, grey: int = 0) -> None:
    write_picture(files[0], distance_HxW.shape, grey)
    files[1].parent.mkdir(parents=True, exist_ok=True)
    (files[1].parents[3] / LIST).write_text(HEADER)
    with h5py.File(files[1], "w") as file:
        file.create_dataset("dataset", data=distance_HxW, compression="gzip")


def kitti_files(rgb: Path, depth: Path, scene: str = "Scene01", camera: int = 0, frame: int = 0) -> tuple[Path, Path]:
    frames = f"{scene}/15-deg-left/frames"
    return (
        rgb / frames / "rgb" / f"Camera_{camera}" / f"rgb_{frame:05d}.jpg",
        depth / frames / "depth" / f"Camera_{camera}" / f"depth_{frame:05d}.png",
    )


def write_kitti(files: tuple[Path, Path], centimetres_HxW: np.ndarray, grey: int = 0) -> None:
    write_picture(files[0], centimetres_HxW.shape, grey)
    files[1].parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(centimetres_HxW).save(files[1])


def write_picture(file: Path, size: tuple[int, ...], grey: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size[:2], 3), grey, np.uint8)).save(file)


def refused(told: str, call, *arguments) -> None:
    with pytest.raises(InputError, match=told) as error:
        call(*arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("height", "width"), [(768, 1024), (48, 64), (15, 31)])
def test_a_wall_across_the_axis_has_one_depth_at_every_size(tmp_path: Path, height: int, width: int) -> None:
    focal = width / 2 / np.tan(np.radians(60) / 2)  # 886.81 at 1024
    rows, columns = np.mgrid[:height, :width]
    x, y = columns + 0.5 - width / 2, rows + 0.5 - height / 2
    distance = 3.25 * np.sqrt(1 + (x**2 + y**2) / focal**2)
    np.testing.assert_allclose(distance_to_depth(distance, focal), 3.25, rtol=1e-6)
    write_hypersim(hypersim_files(tmp_path), distance.astype(np.float16))
    example = Hypersim(tmp_path)[0]
    assert example["depth"].dtype == np.float32 and example["depth"].shape == example["image"].shape[:2]
    np.testing.assert_allclose(example["depth"], 3.25, rtol=2**-11 + 1e-5)  # half precision, and 886.81's digits


def test_distances_that_do_not_count_have_no_depth(tmp_path: Path) -> None:
    distance = np.ones(SIZE, np.float16)
    distance[0, :7] = [np.nan, np.inf, 0, -1, 9e-5, 120.5, 120]
    write_hypersim(hypersim_files(tmp_path), distance)
    assert np.flatnonzero(Hypersim(tmp_path)[0]["depth"] == 0).tolist() == [0, 1, 2, 3, 4, 5]


def test_frames_in_order_and_pickled_alike(tmp_path: Path) -> None:
    names = [("ai_010_001", "cam_00", 3), ("ai_001_010", "cam_01", 2), ("ai_001_010", "cam_00", 11)]
    for grey, (scene, camera, frame) in enumerate(names):
        write_hypersim(hypersim_files(tmp_path / "h", scene, camera, frame), np.ones(SIZE, np.float16), 100 * grey)
    for grey, (scene, camera, frame) in enumerate([("Scene06", 0, 1), ("Scene01", 1, 0), ("Scene01", 0, 10)]):
        files = kitti_files(tmp_path / "k", tmp_path / "k", scene, camera, frame)
        write_kitti(files, np.full((375, 1242), 100, np.uint16), 100 * grey)
    (tmp_path / "h" / "ai_001_010" / "images" / "scene_cam_00_final_preview" / "frame.0011.color.jpg").touch()
    for spec in (f"hypersim:{tmp_path / 'h'}", f"vkitti2:{tmp_path / 'k'}"):
        source = pickle.loads(pickle.dumps(open_source(spec)))
        assert [round(float(source[i]["image"].mean())) for i in range(len(source))] == [200, 100, 0]
        assert {source[i]["text"] for i in range(len(source))} == {""}


def test_the_data_sets_own_list_chooses_frames(tmp_path: Path) -> None:
    for frame in range(4):
        write_hypersim(hypersim_files(tmp_path, frame=frame), np.full(SIZE, frame + 1, np.float16), 60 * frame)
    hypersim_files(tmp_path, frame=3)[1].unlink()  # excluded from the release: neither file is wanted

    def frames(option: str) -> list[int]:
        source = open_source(f"hypersim:{tmp_path}{option}")
        return [round(float(source[i]["image"].mean() / 60)) for i in range(len(source))]

    (tmp_path / LIST).unlink()
    for option in ("", "?split=train"):
        refused(rf"{LIST} is not there, .* take it from https.*evermotion_dataset/analysis", frames, option)
    rows = ["ai_001_001,cam_00,1,True,,val", "ai_001_001,cam_00,0,True,,train", "ai_777_001,cam_00,0,True,,test"]
    excluded = "ai_001_001,cam_00,3,False,CONTENT FLAGGED FOR REMOVAL,"
    (tmp_path / LIST).write_text("\n".join([HEADER, *rows, excluded, ""]))
    assert frames("?split=train") == [0] and frames("?split=val") == [1]
    assert frames("") == [0, 1, 2]  # the list does not know 2
    refused("holds no frames of Hypersim in test; unpack", frames, "?split=test")
    refused("no split 'validation', only train, val, test", frames, "?split=validation")
    for text, told in [
        (f"{HEADER.replace('frame_id', 'frame')}\n{rows[0]}", "has no column 'frame_id'; it must have scene_name, "),
        (f"{HEADER}\nai_001_001,cam_00,x,True,,val", "cannot be read .*'x'"),
        (f"{HEADER}\nai_001_001", "cannot be read"),
        (f"{HEADER}\n\xff", "cannot be read"),
    ]:
        (tmp_path / LIST).write_text(text, encoding="latin-1")
        refused(f"{LIST} {told}", frames, "")


@pytest.mark.parametrize("rgb, depth", [("", ""), ("vkitti_2.0.3_rgb", "vkitti_2.0.3_depth"), ("rgb", "depth")])
def test_virtual_kitti_is_in_centimetres_and_cut_as_kitti(tmp_path: Path, rgb: str, depth: str) -> None:
    centimetres = np.arange(375 * 1242).reshape(375, 1242).astype(np.uint16)
    centimetres[374, 13:18] = [0, 1, 12000, 12001, 65535]
    write_kitti(kitti_files(tmp_path / rgb, tmp_path / depth), centimetres)
    example = VirtualKitti2(tmp_path)[0]
    assert example["image"].shape == (352, 1216, 3) and example["depth"].dtype == np.float32
    wanted = np.where(centimetres <= 12000, centimetres, 0)[23:, 13:1229] / 100
    np.testing.assert_allclose(example["depth"], wanted, rtol=1e-6)
    np.testing.assert_allclose(example["depth"][-1, :5], [0, 0.01, 120, 0, 0], rtol=1e-6)


def test_a_frame_needs_both_files(tmp_path: Path) -> None:
    for frame in range(7):
        files = hypersim_files(tmp_path / "h", frame=frame)
        write_hypersim(files, np.ones(SIZE, np.float16))
        files[frame == 6].unlink()
    refused(
        r"frame\.0006\.tonemap\.jpg has no depth, .*0003\S+ has no picture and 2 more; unpack", Hypersim, tmp_path / "h"
    )
    write_picture(kitti_files(tmp_path, tmp_path)[0], SIZE, 0)
    refused(r"Scene01/15-deg-left/frames/rgb/Camera_0/rgb_00000\.jpg has no depth; unpack", VirtualKitti2, tmp_path)


def test_folders_without_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / LIST).write_text(HEADER)
    refused("holds no frames of Hypersim; unpack", Hypersim, tmp_path)
    refused("holds no frames of Virtual KITTI 2; unpack", VirtualKitti2, tmp_path)
    refused("nowhere is not a folder", VirtualKitti2, tmp_path / "nowhere")
    refused("no option 'split'; vkitti2 has none", open_source, f"vkitti2:{tmp_path}?split=train")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(r"needs h5py: \./launch/install\.sh depth", Hypersim, tmp_path)


def test_damaged_hypersim_files_are_named(tmp_path: Path) -> None:
    picture, depth = files = hypersim_files(tmp_path)
    wall = np.random.default_rng(0).uniform(1, 9, SIZE).astype(np.float16)
    write_hypersim(files, wall)
    source, whole = Hypersim(tmp_path), depth.read_bytes()
    for data in (b"", b"no HDF5", whole[: len(whole) // 2], whole[:-100] + bytes(100)):
        depth.write_bytes(data)
        refused(r"frame\.0000\.depth_meters\.hdf5 cannot be read \(.+\); replace", source.__getitem__, 0)
    for array, told in [
        (wall[1:], r"its shape is \(11, 16\), its picture's \(12, 16\)"),
        (wall[..., None], r"its shape is \(12, 16, 1\)"),
        (np.ones(SIZE, np.uint16), "its numbers are of another type"),
    ]:
        write_hypersim((tmp_path / "other.jpg", depth), array)
        refused(rf"depth_meters\.hdf5 cannot be read \({told}", source.__getitem__, 0)
    with h5py.File(depth, "w") as file:
        file.create_dataset("depth", data=wall)
    refused(r"depth_meters\.hdf5 cannot be read \(.+\); replace", source.__getitem__, 0)
    picture.write_bytes(b"no picture")
    refused(r"frame\.0000\.tonemap\.jpg does not decode", source.__getitem__, 0)


def test_damaged_virtual_kitti_files_are_named(tmp_path: Path) -> None:
    _, depth = files = kitti_files(tmp_path, tmp_path)
    write_kitti(files, np.random.default_rng(0).integers(1, 9999, (352, 1216), np.uint16))
    source, whole = VirtualKitti2(tmp_path), depth.read_bytes()
    for data in (b"", b"no PNG", whole[: len(whole) // 2]):
        depth.write_bytes(data)
        refused(r"depth_00000\.png cannot be read \(.+\); replace", source.__getitem__, 0)
    Image.fromarray(np.ones((352, 1216), np.uint8)).save(depth)
    refused(r"depth_00000\.png cannot be read \(its numbers are of another type", source.__getitem__, 0)
    Image.fromarray(np.ones((352, 1215), np.uint16)).save(depth)
    refused(r"its shape is \(352, 1215\), its picture's \(352, 1216\)", source.__getitem__, 0)
    write_kitti(files, np.ones((300, 1216), np.uint16))
    refused(r"rgb_00000\.jpg: .* cannot be cut to 352 x 1216; take the data set's own", source.__getitem__, 0)


DEPTH = np.random.default_rng(0).permutation(np.geomspace(0.5, 90, 401))


def with_invalid(depth: np.ndarray, invalid: list[float]) -> np.ndarray:
    return np.concatenate([depth, np.resize(np.array(invalid, np.float32), 99)]).reshape(20, 25)


def test_the_1st_and_99th_percentile_of_valid_pixels_become_the_ends() -> None:
    depth = with_invalid(DEPTH, [0.0])
    y, valid = normalised(depth)
    assert y.dtype == np.float32 and valid.dtype == bool
    np.testing.assert_array_equal(valid, depth > 0)
    ranks = np.argsort(np.argsort(DEPTH))  # 0 nearest, 400 farthest: percentiles 1 and 99 are ranks 4 and 396
    wanted = np.clip((ranks - 4) / 392 * 2 - 1, -1, 1)  # depths are evenly spaced in the logarithm
    np.testing.assert_allclose(y.ravel()[:401], wanted, atol=1e-6)
    np.testing.assert_array_equal(y.ravel()[401:], 1)


@pytest.mark.parametrize("change", [lambda z: z * 1000, lambda z: z / 7, lambda z: z**2, lambda z: z**0.5])
def test_neither_unit_nor_power_of_depth_makes_a_difference(change) -> None:
    np.testing.assert_allclose(normalised(change(DEPTH[None]))[0], normalised(DEPTH[None])[0], atol=1e-6)


def test_what_is_invalid_never_matters() -> None:
    plain = normalised(with_invalid(DEPTH, [0.0]))
    for invalid in ([-3.0], [np.nan], [np.inf, -np.inf], [0.0, np.nan, -1e9]):
        for found, wanted in zip(normalised(with_invalid(DEPTH, invalid)), plain, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_maps_without_a_range() -> None:
    y, valid = normalised(np.array([[0.0, np.nan]]))
    assert y.tolist() == [[1, 1]] and not valid.any()
    y, valid = normalised(np.array([[0.0, 2.5, 2.5]]))
    assert y.tolist() == [[1, 0, 0]] and valid.tolist() == [[False, True, True]]
