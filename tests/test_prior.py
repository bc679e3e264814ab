"""The checkpoint that a run begins with, or that is looked at: whose task and whose flow it has."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small

from configs import depth, quickstart, text_to_image
from d2f_jax import InputError, Pipeline, comparison, evaluate, prior, train
from d2f_jax.alignment import ALIGNED, Alignment
from d2f_jax.program import Config
from d2f_jax.sampler import Sampler
from d2f_jax.task import TEXT_TO_IMAGE, Task

NAIVE = Alignment(timestep=False, state=False, velocity=False, raw_time=True)
AT_PICTURE = Task("image_to_depth", start="image", start_noise=0.5, concatenate=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A diffusion model, which records nothing, and exports of a naive flow and of depth that starts at the picture."""
    folder = tmp_path_factory.mktemp("models")
    plain = Pipeline.from_pretrained(small.write_pipeline(folder / "plain"))
    dataclasses.replace(plain, alignment=NAIVE).save_pretrained(folder / "naive")
    dataclasses.replace(plain.for_task(AT_PICTURE), alignment=NAIVE).save_pretrained(folder / "depth")
    plain.for_task(Task("image_to_depth")).save_pretrained(folder / "plain_depth")
    return {name: folder / name for name in ("plain", "naive", "depth", "plain_depth")}


def of(config: Config, model: Path, **changes: Any) -> Config:
    config.update_from_flattened_dict({"model": str(model), **changes})
    return config


@pytest.mark.parametrize("objective", ["diff2flow", "flow_matching", "diffusion"])
@pytest.mark.parametrize(("name", "flow"), [("plain", ALIGNED), ("naive", NAIVE)])
def test_what_is_looked_at_flows_as_it_records_and_what_learns_as_it_is_told(
    models: dict[str, Path], objective: str, name: str, flow: Alignment
) -> None:
    config = of(text_to_image.get_config(objective), models[name])
    assert prior.load_as_it_is(config).alignment == flow
    assert prior.load(config).alignment == (NAIVE if objective == "flow_matching" else ALIGNED)


def test_the_published_code_s_checkpoints_record_nothing(models: dict[str, Path]) -> None:
    config = of(quickstart.get_config(), models["plain"])
    assert prior.load_as_it_is(config, convention="reference").alignment == Alignment(convention="reference")


def test_a_convention_aligns_nothing_that_was_not(models: dict[str, Path]) -> None:
    config = of(quickstart.get_config(), models["naive"])
    assert prior.load_as_it_is(config, convention="exact").alignment == NAIVE
    found = prior.load_as_it_is(config, convention="reference").alignment
    assert found == dataclasses.replace(NAIVE, convention="reference")


def test_the_task_is_the_model_s_own(models: dict[str, Path]) -> None:
    seeing = prior.load_as_it_is(of(depth.get_config("diff2flow"), models["depth"]))
    assert (seeing.task, seeing.alignment) == (AT_PICTURE, NAIVE)
    asked = {f"task.{name}": value for name, value in dataclasses.asdict(AT_PICTURE).items()}
    assert prior.load_as_it_is(of(depth.get_config("diff2flow"), models["depth"], **asked)).task == AT_PICTURE
    assert prior.load_as_it_is(of(quickstart.get_config(), models["plain"])).task == TEXT_TO_IMAGE


@pytest.mark.parametrize(
    ("arg", "model", "changes", "said"),
    [
        (
            "",
            "depth",
            {},
            r"task\.name=text_to_image, but \S+ has learned image_to_depth; set --config\.task\.name=i",
        ),
        (
            "depth",
            "plain",
            {},
            r"task\.name=image_to_depth, but \S+ has learned text_to_image; set --config\.task\.name=t",
        ),
        (
            "depth",
            "plain_depth",
            {"task.start": "image", "task.start_noise": 0.5},
            r"task\.start=image, but \S+ has learned noise; set --config\.task\.start=noise, and "
            r"config\.task\.start_noise=0\.5, but \S+ has learned 0\.0; set --config\.task\.start_noise=0\.0$",
        ),
        ("depth", "plain", {"task.adapters": True}, r"adapters=True, but \S+ has no adapters that .* give --lora=FILE"),
    ],
)
def test_another_task_is_refused(
    models: dict[str, Path], arg: str, model: str, changes: dict[str, Any], said: str
) -> None:
    config = depth.get_config("diff2flow") if arg else quickstart.get_config()
    with pytest.raises(InputError, match=said):
        prior.load_as_it_is(of(config, models[model], **changes))


@pytest.mark.parametrize(("name", "rows"), [("plain", 4), ("naive", 2)])
def test_ddim_is_drawn_of_a_prior_that_is_a_diffusion_model(models: dict[str, Path], name: str, rows: int) -> None:
    """Whatever flow it is to learn; a prior that is a flow of its own has no DDIM."""
    config = of(text_to_image.get_config("flow_matching"), models[name])
    before = prior.load(config)
    made = comparison.contenders(before, before, "flow_matching", Sampler("euler"))
    assert len(made) == rows and all(row.pipeline.alignment == NAIVE for row in made[-2:])
    assert all(row.sampler.name.startswith("ddim") and row.pipeline.alignment == ALIGNED for row in made[:-2])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval.sampler": "sde_euler"}, r"step_counts=\(1, 2, 4, 8, 25\): an SDE of 1 steps"),
        ({"eval.sampler": "sde_euler", "eval.sde.last_step_size": 0.95}, "a size between 0 and 0.9"),
        (
            {"eval.sampler": "sde_heun", "eval.sde.form": "SBDM", "eval.begin": "zero", "eval.step_counts": (4,)},
            "SBDM is infinite at t = 0",
        ),
        ({"eval.step_counts": (4, 1001)}, "the model has 1000 timesteps; give fewer"),
    ],
)
def test_steps_that_no_sampler_takes_are_refused_before_anything_is_done(
    models: dict[str, Path], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    config = of(quickstart.get_config(), models["plain"], **{"data.image_size": 16} | changes)
    with pytest.raises(InputError, match=said):
        train.train(config, tmp_path / "run")
    with pytest.raises(InputError, match=said):
        evaluate.evaluate(config, tmp_path / "scores")
    assert not list(tmp_path.iterdir())


def test_what_ddim_does_with_a_model_it_does_with_its_export(models: dict[str, Path], tmp_path: Path) -> None:
    plain = Pipeline.from_pretrained(models["plain"])
    before = dataclasses.replace(plain, scheduler_config=plain.scheduler_config | {"timestep_spacing": "trailing"})
    before.save_pretrained(tmp_path)
    after = Pipeline.from_pretrained(tmp_path)
    assert not before.model.set_alpha_to_one
    drawn = [p("a cube", num_steps=3, guidance_scale=1.0, sampler="ddim").astype(int) for p in (before, after)]
    assert np.abs(drawn[0] - drawn[1]).max() <= 1


@pytest.mark.parametrize("sampler", ["ddim", "ddim_on_flow_grid"])
def test_a_flow_that_is_not_aligned_is_not_drawn_by_ddim(models: dict[str, Path], sampler: Any) -> None:
    with pytest.raises(
        InputError, match=f"sampler='{sampler}' is of diffusion models and of flows aligned .* use euler"
    ):
        Pipeline.from_pretrained(models["naive"])("a cube", sampler=sampler)
