"""Sampling: PyTorch diffusers draws the same pictures from the same weights and noise."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import twins
from flax import nnx
from PIL import Image

from d2f_jax import InputError, Pipeline, metrics, sampling, sharding, weights
from d2f_jax.alignment import Alignment
from d2f_jax.models.unet import UNet2DConditionModel
from d2f_jax.sampler import Sampler, SamplerName

PROMPTS = ["a red cube", "a large blue sphere left of a small yellow cone on snow at night"]


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return Pipeline.from_pretrained("tiny-sd")


def assert_same_pictures(ours: np.ndarray, theirs: np.ndarray) -> None:
    """`theirs` in [0, 1]; at most two of 255 levels apart."""
    assert ours.dtype == np.uint8 and ours.std() > 10, "blank pictures prove nothing"
    assert np.abs(ours.astype(float) - 255 * theirs).max() <= 2.5  # ours are rounded, theirs are not


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_ddim_of_diffusers(tiny: Pipeline, rescale: float) -> None:
    theirs = small.torch_pipeline(weights.TINY_SD)
    noise, guidance = tiny.noise(3, 2), {"guidance_scale": 3.0, "guidance_rescale": rescale}
    options = {"num_inference_steps": 6, "output_type": "np", **guidance}
    expected = theirs(PROMPTS, negative_prompt=["a cone"] * 2, latents=twins.nchw(np.asarray(noise)), **options).images
    ours = tiny(PROMPTS, negative_prompt="a cone", noise=noise, num_steps=6, sampler="ddim", **guidance)
    assert_same_pictures(ours, expected)
    if rescale:
        plain = tiny(PROMPTS, negative_prompt="a cone", noise=noise, num_steps=6, sampler="ddim", guidance_scale=3.0)
        assert np.abs(ours.astype(int) - plain).max() > 10


def test_guidance_is_one_call_of_the_network_for_both(tiny: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []

    def counted(_self: Any, x: jax.Array, _tau_B: jax.Array, text_BxLxD: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: seen.append((len(x), len(text_BxLxD))))
        return x

    monkeypatch.setattr(UNet2DConditionModel, "__call__", counted)
    for scale, rows in ((1.0, 2), (3.0, 4)):
        dataclasses.replace(tiny, _programs={})(PROMPTS, num_steps=3, guidance_scale=scale)
        jax.effects_barrier()
        assert seen == [(rows, rows)] * 3
        seen.clear()


@pytest.mark.parametrize("num_steps", [1, 4])
def test_the_export_in_diffusers(tiny: Pipeline, tmp_path: Path, num_steps: int) -> None:
    of_rectangles = nnx.clone(tiny.unet)
    of_rectangles.config = dataclasses.replace(tiny.unet.config, sample_size=(12, 20))
    dataclasses.replace(tiny, unet=of_rectangles).save_pretrained(tmp_path / "export")
    theirs = small.torch_pipeline(tmp_path / "export")
    assert type(theirs.scheduler).__name__ == "EulerDiscreteScheduler"
    noise = Pipeline.from_pretrained(tmp_path / "export").noise(4, 2)
    grid = sampling.flow_grid(tiny.schedule, num_steps)
    expected = theirs(
        PROMPTS,
        latents=twins.nchw(np.asarray(noise)),
        guidance_scale=3.0,
        num_inference_steps=num_steps,
        sigmas=sampling.diffusers_sigmas(grid),
        output_type="np",
    ).images
    ours = tiny(PROMPTS, noise=noise, guidance_scale=3.0, num_steps=num_steps)
    assert ours.shape == (2, 48, 80, 3)
    assert_same_pictures(ours, expected)


def test_flow_steps_are_ddim_on_the_same_grid(tiny: Pipeline) -> None:
    for num_steps, shift in ((1, 1.0), (5, 1.0), (5, 3.0)):
        flow, ddim = (
            tiny(PROMPTS, num_steps=num_steps, guidance_scale=3.0, seed=1, sampler=Sampler(name, shift=shift))
            for name in ("euler", "ddim_on_flow_grid")
        )
        assert np.abs(flow.astype(int) - ddim).max() <= 1


def test_what_only_moves_the_grid_moves_the_pictures(tiny: Pipeline) -> None:
    """Shift, beginning and spacing are no part of the compiled program."""
    grids = (Sampler("euler"), Sampler("euler", shift=3.0), Sampler("euler", begin="zero"))
    spaced = (Sampler("ddim"), Sampler("ddim", spacing="trailing"), Sampler("ddim", spacing="quad"))
    for samplers in (grids, spaced):
        drawn = [tiny(PROMPTS, num_steps=5, seed=1, sampler=sampler).astype(int) for sampler in samplers]
        assert all(np.abs(a - b).max() > 5 for a, b in itertools.combinations(drawn, 2))


def test_a_trajectory_ends_at_the_pictures(tiny: Pipeline) -> None:
    options = {"num_steps": 3, "guidance_scale": 3.0, "seed": 1, "sampler": "heun"}
    way, pictures = tiny(PROMPTS, trajectory=True, **options), tiny(PROMPTS, **options)
    assert way.shape == (2, 4, 64, 64, 3) and way.dtype == np.uint8
    assert np.abs(way[:, -1].astype(int) - pictures).max() <= 1
    latents = sampling.from_noise(tiny.noise(1, 2), sampling.flow_grid(tiny.schedule, 3)[0])
    first = np.asarray(tiny.vae.decode(latents / tiny.vae.config.scaling_factor))
    np.testing.assert_allclose(way[:, 0], np.clip(first / 2 + 0.5, 0, 1) * 255, atol=0.51)
    with pytest.raises(InputError, match="sampler='ddim' tells no trajectory; use euler"):
        tiny(PROMPTS, trajectory=True, num_steps=3, sampler="ddim")


def test_seeds_reproduce_and_rows_do_not_depend_on_their_batch(tiny: Pipeline) -> None:
    two = tiny(PROMPTS, num_steps=2, seed=7)
    np.testing.assert_array_equal(two, tiny(PROMPTS, num_steps=2, seed=7))
    assert np.abs(two[:1].astype(int) - tiny(PROMPTS[0], num_steps=2, seed=7)).max() <= 1
    assert np.abs(two.astype(int) - tiny(PROMPTS, num_steps=2, seed=8)).max() > 20


def test_images_do_not_depend_on_the_mesh(tmp_path: Path) -> None:
    pipeline = Pipeline.from_pretrained(small.write_pipeline(tmp_path))
    prompts = [*PROMPTS, "a cone"]  # which eight devices do not divide
    spread = pipeline.on_mesh(sharding.make_mesh(2, 4))
    kernel = spread.unet.conv_in.kernel[...]
    assert len(kernel.sharding.device_set) == 8 and kernel.addressable_shards[0].data.size == kernel.size // 4
    options = {"num_steps": 2, "height": 16, "width": 16, "seed": 3}
    one, many = (p(prompts, **options).astype(int) for p in (pipeline, spread))
    assert one.std() > 10 and one.shape == many.shape == (3, 16, 16, 3)
    assert np.abs(one - many).max() <= 1


def test_no_guidance_is_guidance_of_one(tiny: Pipeline) -> None:
    without = tiny(PROMPTS, num_steps=2, guidance_scale=1.0)
    with_it = tiny(PROMPTS, num_steps=2, guidance_scale=1.0001)
    assert np.abs(without.astype(int) - with_it).max() <= 2
    assert np.abs(without.astype(int) - tiny(PROMPTS, num_steps=2, guidance_scale=4.0)).max() > 20


def test_an_export_replaces_an_earlier_one_and_is_whole(tiny: Pipeline, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "export")
    (tmp_path / "export" / "unet" / "stale.txt").write_text("x")
    tiny.save_pretrained(tmp_path / "export")
    assert not (tmp_path / "export" / "unet" / "stale.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["export"]
    again = Pipeline.from_pretrained(tmp_path / "export")
    np.testing.assert_array_equal(again(PROMPTS, num_steps=2), tiny(PROMPTS, num_steps=2))


def test_an_export_never_replaces_anything_else(tiny: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="holds no pipeline that could be replaced"):
        tiny.save_pretrained(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_reference_convention_samples_otherwise(tiny: Pipeline) -> None:
    reference = dataclasses.replace(tiny, alignment=Alignment(convention="reference"), _programs={})
    one, other = (p(PROMPTS, num_steps=2, seed=3).astype(int) for p in (tiny, reference))
    assert np.abs(one - other).max() > 1
    assert np.abs(one - other).mean() < 5


@pytest.mark.parametrize(
    "sampler",
    [Sampler("heun", shift=2.0), Sampler("dopri5"), Sampler("sde_heun"), Sampler("ddim", eta=1.0)],
    ids=lambda sampler: sampler.name,
)
def test_every_sampler_draws_what_the_prompt_says(tiny: Pipeline, sampler: Sampler) -> None:
    prompts = ["a red cube", "a blue sphere on snow at night"] * 2
    images = tiny(prompts, num_steps=16, guidance_scale=5.0, seed=2, sampler=sampler)
    judged = metrics.load_classifier()(jnp.asarray(images, jnp.float32) / 127.5 - 1)
    assert metrics.caption_accuracy(np.asarray(judged.logits), prompts) >= 0.75
    # An image of a seed is the same in every batch, whatever its steps draw, and however many it takes.
    again = tiny(prompts[2:] * 2, num_steps=16, guidance_scale=5.0, seed=2, first=2, sampler=sampler)
    assert np.abs(images[2:].astype(int) - again[:2]).max() <= 2


def test_its_caption_makes_a_picture_likelier(tiny: Pipeline) -> None:
    images = tiny(PROMPTS, num_steps=8, guidance_scale=3.0, seed=1)
    right, wrong = (tiny.bits_per_dim(images, texts, num_steps=10, seed=2) for texts in (PROMPTS, PROMPTS[::-1]))
    assert (right < wrong - 0.1).all()
    alone = tiny.bits_per_dim(images[1:], PROMPTS[1], num_steps=10, seed=2, first=1)
    np.testing.assert_allclose(alone, right[1:], atol=1e-3)


@pytest.mark.parametrize(("name", "num_steps"), [("heun", 20), ("ddim", 200)])
def test_inversion_finds_noise_that_draws_the_same(tiny: Pipeline, name: SamplerName, num_steps: int) -> None:
    options = {"num_steps": num_steps, "sampler": Sampler(name)}
    images = tiny(PROMPTS, guidance_scale=1.0, seed=5, **options)
    noise = tiny.invert(images, PROMPTS, **options)
    assert name == "ddim" or noise.std() == pytest.approx(1, abs=0.1)  # DDIM's first steps are too long for its noise
    latents = tiny.vae.encode(jnp.asarray(images, jnp.float32) / 127.5 - 1).mean
    coded = np.clip(np.asarray(tiny.vae.decode(latents)) / 2 + 0.5, 0, 1) * 255  # all that inversion can know
    again = tiny(PROMPTS, guidance_scale=1.0, noise=noise, **options).astype(int)
    other = tiny(PROMPTS, guidance_scale=1.0, seed=6, **options).astype(int)
    assert np.abs(coded - again).mean() < 0.02 * np.abs(images - other).mean()


def test_negative_prompts_one_for_each(tiny: Pipeline) -> None:
    options = {"num_steps": 2, "seed": 1}
    both = tiny(PROMPTS, negative_prompt=["a cone", "snow"], **options).astype(int)
    for i, negative in enumerate(("a cone", "snow")):
        assert np.abs(both[i] - tiny(PROMPTS, negative_prompt=negative, **options)[i]).max() <= 1


def test_an_export_remembers_how_it_flows(tiny: Pipeline, tmp_path: Path) -> None:
    naive = Alignment(timestep=False, state=False, velocity=False, raw_time=True, path="gvp")
    dataclasses.replace(tiny, alignment=naive, _programs={}).save_pretrained(tmp_path / "export")
    assert Pipeline.from_pretrained(tmp_path / "export").alignment == naive
    assert Pipeline.from_pretrained(tmp_path / "export", alignment=Alignment()).alignment == Alignment()
    small.torch_pipeline(tmp_path / "export")  # still loads


def test_refusals(tiny: Pipeline) -> None:
    with pytest.raises(InputError, match="num_steps=0"):
        tiny("a", num_steps=0)
    with pytest.raises(InputError, match=r"num_steps=2\.5"):
        tiny("a", num_steps=2.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="sampler='eulr'"):
        tiny("a", sampler="eulr")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="1 prompts, but 2 noise"):
        tiny("a", noise=tiny.noise(0, 2))
    with pytest.raises(InputError, match="1 prompts, but 2 negative prompts"):
        tiny("a", negative_prompt=["b", "c"])
    with pytest.raises(InputError, match="'sde_euler' is random and has no way back"):
        tiny.invert(np.zeros((1, 64, 64, 3), np.uint8), "a", sampler="sde_euler")
    naive = dataclasses.replace(tiny, alignment=Alignment(velocity=False), _programs={})
    with pytest.raises(InputError, match="'ddim' is of diffusion models and of flows aligned with them"):
        naive("a", sampler="ddim")
    with pytest.raises(InputError, match="num_steps=1001: DDIM takes 1 to 1000"):
        tiny("a", num_steps=1001, sampler="ddim")
    with pytest.raises(InputError, match="height=50 is not a multiple of 4"):
        tiny("a", height=50)
    with pytest.raises(InputError, match="no prompt"):
        tiny([])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"in_channels": 9}, "takes 9 channels, the VAE makes 4"),
        ({"cross_attention_dim": 32}, "takes 32 text features, the text encoder makes 16"),
    ],
)
def test_parts_that_do_not_belong_together(tmp_path: Path, change: dict, said: str) -> None:
    folder = small.write_pipeline(tmp_path)
    twins.written(twins.unet(**small.UNET | change), folder / "unet")
    with pytest.raises(InputError, match=said):
        Pipeline.from_pretrained(folder)


def test_more_tokens_than_positions(tmp_path: Path) -> None:
    folder = small.write_pipeline(tmp_path)
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 77}))
    with pytest.raises(InputError, match="makes 77 tokens, the text encoder takes 24"):
        Pipeline.from_pretrained(folder)


def test_the_six_lines_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = Path(__file__).parents[1].joinpath("README.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "Pipeline." in block)
    assert "quickstart/export" in code
    monkeypatch.chdir(tmp_path)
    exec(code.replace("quickstart/export", "tiny-sd"), {})
    assert Image.open(next(tmp_path.glob("*.png"))).size == (64, 64)
