"""ShapesWorld: the renderer's laws, and the TFDS builder's round trip."""

import itertools

import numpy as np
import pytest

from d2f_jax.data import shapes, shapes_world
from d2f_jax.data.shapes_world import ShapesWorldSource
from d2f_jax.errors import InputError
from d2f_jax.metrics.captions import caption_pairs

EYE_HEIGHT, EYE_Z, HALF_FIELD = 2.3, -5.3, 0.47
FORWARD = np.array([0, -1.45, 5.9]) / np.hypot(1.45, 5.9)


def scene_of(*solids: shapes.Solid) -> shapes.Scene:
    return shapes.Scene(solids, "tiles", shapes.SKIES[0], azimuth=0.7, caption="")


def build(folder, split="train", size=32, num_train=6, num_validation=3) -> ShapesWorldSource:
    return shapes_world.shapes_world(folder, size=size, num_train=num_train, num_validation=num_validation, split=split)


def files(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*.array_record*")}


def test_the_same_index_gives_the_same_scene_and_picture():
    for index in range(5):
        a, b = shapes.sample_scene(3, index), shapes.sample_scene(3, index)
        assert a == b
        np.testing.assert_array_equal(shapes.render(a, 24).image, shapes.render(b, 24).image)
    assert shapes.sample_scene(3, 0) != shapes.sample_scene(4, 0)
    assert shapes.sample_scene(3, 0) != shapes.sample_scene(3, 1)


def test_the_scene_does_not_depend_on_the_size_of_the_picture():
    for index in range(5):
        scene = shapes.sample_scene(1, index)
        small, large = shapes.render(scene, 32), shapes.render(scene, 128)
        averaged = large.image.reshape(32, 4, 32, 4, 3).mean((1, 3))
        # What is finer than a pixel, the stars above all, is drawn differently.
        assert np.abs(averaged - small.image).mean() < 5
        near = (small.depth > 0) & (small.depth < 12)
        relative = np.abs(large.depth[2::4, 2::4] - small.depth)[near] / small.depth[near]
        assert np.median(relative) < 0.02


@pytest.mark.parametrize("size", [16, 64])
def test_depth_of_the_ground_is_that_of_the_plane(size):
    depth = shapes.render(scene_of(), size).depth
    # Depth is sampled at three quarters of the pixel, where the second of the two rays goes.
    offset = ((np.arange(size) + 0.75) / size * 2 - 1) * HALF_FIELD
    with np.errstate(divide="ignore"):
        expected = EYE_HEIGHT / (offset * FORWARD[2] - FORWARD[1])
    ground = (expected > 0) & (expected < 50)
    assert ground.sum() > size / 2
    np.testing.assert_allclose(depth[ground], np.broadcast_to(expected[ground, None], (ground.sum(), size)), rtol=1e-4)
    assert (depth[expected < 0] == 0).all()
    assert (depth[0] == 0).all()


@pytest.mark.parametrize("radius", [0.6, 0.98])
def test_depth_of_a_sphere_on_the_axis(radius):
    along = (EYE_HEIGHT - radius) / -FORWARD[1]  # where the axis is as high as the sphere's centre
    ball = shapes.Solid("sphere", "red", "large", radius, 0.0, EYE_Z + along * FORWARD[2], 0.0)
    depth, behind = (shapes.render(scene_of(*solids), 128).depth for solids in ((ball,), ()))
    # In the camera's coordinates: the nearer of the two s with |s*(offset, offset, 1) - (0, 0, along)| = radius.
    squared = 1 + 2 * ((64.75 / 128 * 2 - 1) * HALF_FIELD) ** 2
    expected = (along - np.sqrt(along**2 - squared * (along**2 - radius**2))) / squared
    assert depth[64, 64] == pytest.approx(expected, abs=1e-4)
    assert depth[depth != behind].min() == pytest.approx(along - radius, abs=1e-3)


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_a_solid_hides_the_ground_and_keeps_its_colour(shape):
    solid = shapes.Solid(shape, "red", "large", 0.98, 0.0, 0.3, 0.4)
    empty, full = shapes.render(scene_of(), 64), shapes.render(scene_of(solid), 64)
    covered = (full.depth != empty.depth) & (full.depth > 0)
    assert 150 < covered.sum() < 1500
    assert (full.depth[covered & (empty.depth > 0)] < empty.depth[covered & (empty.depth > 0)]).all()
    red, green, blue = full.image[covered].astype(int).T
    assert np.mean((red > green + 30) & (red > blue + 30)) > 0.9


def test_depth_fits_the_stored_units():
    depth = np.stack([shapes.render(shapes.sample_scene(0, i), 32).depth for i in range(20)])
    assert depth.min() >= 0 and depth.max() * shapes_world.DEPTH_SCALE < 2**16


def test_captions_name_the_solids_from_left_to_right():
    for index in range(300):
        scene = shapes.sample_scene(0, index)
        assert caption_pairs(scene.caption) == [(s.colour, s.shape) for s in scene.solids]
        assert len({s.colour for s in scene.solids}) == len(scene.solids) in (1, 2, 3)
        across = [s.x / (s.z - EYE_Z) for s in scene.solids]
        assert across == sorted(across)


def test_captions_distinguish_and_use_a_small_vocabulary():
    scenes = [shapes.sample_scene(0, i) for i in range(1000)]
    words = set(itertools.chain.from_iterable(s.caption.replace(",", "").split() for s in scenes))
    known = {*shapes.SHAPES, *shapes.COLOURS, *shapes.SIZES, *shapes.GROUNDS}
    assert words == known | {"a", "an", "and", "of", "left", "on", "at", "noon", "sunset", "night"}
    assert len({s.caption for s in scenes}) > 850
    assert all(sum(c in s.caption for s in scenes) > 80 for c in shapes.COLOURS)


def test_the_builder_keeps_image_depth_and_caption(tmp_path):
    for split, seed in shapes_world.WORLD_SEEDS.items():
        source = build(tmp_path, split)
        assert len(source) == {"train": 6, "validation": 3}[split]
        for index in range(len(source)):
            scene = shapes.sample_scene(seed, index)
            rendering, example = shapes.render(scene, 32), source[index]
            np.testing.assert_array_equal(example["image"], rendering.image)
            assert example["text"] == scene.caption
            depth = example["depth"]  # pyright: ignore[reportTypedDictNotRequiredAccess]
            np.testing.assert_allclose(depth, rendering.depth, atol=0.51 / shapes_world.DEPTH_SCALE)
            np.testing.assert_array_equal(depth == 0, rendering.depth == 0)


def test_two_builds_are_the_same_bit_for_bit_with_and_without_processes(tmp_path, monkeypatch):
    build(tmp_path / "a")
    monkeypatch.setattr(shapes_world, "_WORTH_WORKERS", 4)
    build(tmp_path / "b")
    assert len(files(tmp_path / "a")) == 2
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_what_is_built_is_not_built_again(tmp_path, monkeypatch):
    build(tmp_path)
    monkeypatch.setattr(shapes, "render", None)
    assert len(build(tmp_path)) == 6


def test_another_size_or_count_is_another_folder(tmp_path):
    sources = [build(tmp_path), build(tmp_path, size=16), build(tmp_path, num_train=2)]
    assert [s[0]["image"].shape[0] for s in sources] == [32, 16, 32]
    assert [len(s) for s in sources] == [6, 6, 2]
    assert len({s[0]["text"] for s in sources}) == 1


def test_an_interrupted_build_leaves_no_data_set(tmp_path, monkeypatch):
    render, calls = shapes.render, []

    def interrupted(scene, size):
        calls.append(scene)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return render(scene, size)

    monkeypatch.setattr(shapes, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path)
    assert not list(tmp_path.rglob("dataset_info.json"))
    monkeypatch.setattr(shapes, "render", render)
    assert len(build(tmp_path)) == 6


def test_bad_arguments_are_told(tmp_path):
    with pytest.raises(InputError, match="size=0"):
        build(tmp_path, size=0)
    with pytest.raises(InputError, match="num_train=0"):
        build(tmp_path, num_train=0)
    with pytest.raises(InputError, match="no split 'test'"):
        build(tmp_path, split="test")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be built there"):
        build(tmp_path / "file")
