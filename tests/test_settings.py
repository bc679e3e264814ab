"""What a config may say, and whose a workdir is."""

import json
from pathlib import Path
from types import ModuleType

import jax
import pytest
from ml_collections import ConfigDict

from configs import depth, images, quickstart, reflow, text_to_image
from d2f_jax import InputError, flow, settings, sharding, train
from d2f_jax.sampler import Sampler
from d2f_jax.sde import SDE

MESH = sharding.make_mesh(2, 4)


def changed(**changes: object) -> ConfigDict:
    config = quickstart.get_config()
    config.update_from_flattened_dict(changes)
    return config


SOURCE = "array_record:prepared"
CONFIGS = {
    quickstart: ("", *quickstart.LORA),
    images: ("image_folder:pictures", "lora_base:image_folder:pictures"),
    text_to_image: tuple(
        f"{name}{lora}{source}"
        for name in text_to_image.OBJECTIVES
        for lora in ("", ":lora_small", ":sd15:lora_base")
        for source in ("", f":{SOURCE}")
        if source or "sd15" not in lora
    ),
    depth: tuple(
        f"{name}{model}{lora}{source}"
        for name in text_to_image.OBJECTIVES
        for model in ("", ":sd15")
        for lora in ("", ":lora_base")
        for source in ("", f":{SOURCE}")
        if source or not model
    ),
    reflow: tuple(
        f"{name}{lora}{rest}"
        for name in text_to_image.OBJECTIVES
        for lora in ("", ":lora_small")
        for rest in ("", f":{SOURCE}", f":small:{SOURCE}")
    ),
}


@pytest.mark.parametrize(("file", "arg"), [(file, arg) for file, args in CONFIGS.items() for arg in args])
def test_what_the_configs_say_is_allowed(file: ModuleType, arg: str) -> None:
    config = file.get_config(arg)
    settings.check(config, MESH)
    assert config.lora.enabled == ("lora" in arg)
    if file in (text_to_image, depth, reflow):
        assert config.objective.name == arg.partition(":")[0]
        assert config.data.sources == ((SOURCE,) if SOURCE in arg else ("shapes_world",))
        small = SOURCE not in arg or "small" in arg.split(":")
        assert config.model == (
            "tiny-sd" if small else text_to_image.SD15 if file is reflow or "sd15" in arg else text_to_image.SD21
        )


@pytest.mark.parametrize("file", [text_to_image, reflow])
def test_an_objective_that_is_not_known(file: ModuleType) -> None:
    with pytest.raises(ValueError, match="objective 'flow' is not known; begin with one of diff2flow, flow_matching"):
        file.get_config("flow:lora_base")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"objective.align": ("timestep", "speed")},
            "config.objective.align=.* give each of timestep, state, velocity",
        ),
        ({"objective.name": "flow_matching", "objective.align": ("state",)}, "align=.* is diff2flow's"),
        ({"objective.raw_time": True}, "leave timestep out of align"),
        ({"objective.min_snr_gamma": 5.0}, "is of diffusion; use 0 for diff2flow"),
        ({"objective.path": "vp"}, r"config\.objective\.path='vp' is unknown; use one of linear, gvp"),
        ({"objective.path": "gvp"}, r"path=gvp, .* align nothing, which is flow_matching"),
        ({"objective.sigma_min": 0.1, "objective.align": ("state",)}, r"sigma_min=0\.1: only .* with sigma_min=0 can"),
        ({"objective.name": "diffusion", "objective.path": "gvp"}, "only the linear path"),
        (
            {"objective.name": "flow_matching", "objective.path": "gvp", "objective.sigma_min": 0.1},
            "sigma_min=0.1 is of the linear path; use 0 for gvp",
        ),
        (
            {"objective.name": "diffusion", "objective.convention": "reference"},
            "convention=reference is diff2flow's; use exact for diffusion",
        ),
        ({"data.crop": "random", "data.resize": "fixed"}, "resize=fixed leaves nothing to cut"),
        ({"objective.logit_mean": 1.0}, "times are uniform; set config.objective.times=logit_normal"),
        ({"eval.sampler": "dopri5", "eval.shift": 2.0}, "dopri5 finds its own; use 1"),
        ({"task.start": "image", "task.name": "image_to_depth", "eval.sampler": "sde_heun"}, "starts at noise, this"),
        (
            {"task.start": "image", "task.name": "image_to_depth", "eval.depth.ensemble": 4},
            "ensemble=4: a flow from the picture itself, without noise, makes one estimate; use 1",
        ),
        ({"eval.sampler": "eulr"}, "sampler='eulr' is not one of euler, heun"),
        ({"reflow.shift": 3.0}, "ddim has its own"),
        ({"eval.eta": 1.0}, "eta=1.0 is DDIM's, not of sampler='euler'"),
        ({"reflow.eta": 1.5}, "eta=1.5 is not between"),
        ({"reflow.temperature": 0.9}, "are of the noise that DDIM draws with eta above 0"),
        ({"eval.sampler": "ddim", "eval.eta": 1.0, "eval.noise_dropout": 1.0}, "give a share from 0 to less than 1"),
        (
            {"objective.name": "flow_matching", "eval.sampler": "ddim"},
            "sampler='ddim' is of diffusion models and of flows aligned with them",
        ),
        (
            {"objective.align": ("state",), "eval.sampler": "ddim_on_flow_grid"},
            "sampler='ddim_on_flow_grid' is of diffusion models",
        ),
    ],
)
def test_what_does_not_go_together(changes: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        settings.check(changed(**changes), MESH)


@pytest.mark.parametrize(
    ("changes", "aligned"),
    [
        ({}, {"timestep", "state", "velocity"}),
        ({"objective.align": ("velocity",)}, {"velocity"}),
        ({"objective.name": "flow_matching", "objective.raw_time": True}, set()),
        ({"objective.name": "flow_matching", "objective.path": "gvp"}, set()),
        ({"objective.name": "flow_matching", "objective.sigma_min": 0.1}, set()),
        ({"objective.name": "diffusion", "objective.min_snr_gamma": 5.0}, {"timestep", "state", "velocity"}),
    ],
)
def test_objectives_differ_by_what_they_align(changes: dict, aligned: set[str]) -> None:
    settings.check(changed(**changes), MESH)
    made = settings.make_objective(changed(**changes))
    assert {name for name in ("timestep", "state", "velocity") if getattr(made.alignment, name)} == aligned
    assert made.alignment.raw_time == changes.get("objective.raw_time", False)
    path = flow.Path(changes.get("objective.path", "linear"), changes.get("objective.sigma_min", 0.0))
    assert made.alignment.flow_path == path


def test_samplers_are_what_the_config_says() -> None:
    config = changed(
        **{
            "eval.sampler": "ddim",
            "eval.eta": 0.5,
            "eval.temperature": 0.9,
            "eval.noise_dropout": 0.1,
            "reflow.sampler": "heun",
            "reflow.shift": 2.0,
        }
    )
    assert settings.eval_sampler(config) == Sampler("ddim", eta=0.5, temperature=0.9, noise_dropout=0.1)
    assert settings.reflow_sampler(config) == Sampler("heun", shift=2.0)
    config = changed(
        **{
            "eval.sampler": "sde_heun",
            "eval.sde.form": "SBDM",
            "eval.sde.norm": 0.5,
            "eval.sde.last_step": "mean",
            "eval.sde.last_step_size": 0.1,
            "reflow.sampler": "dopri5",
            "reflow.begin": "zero",
            "reflow.rtol": 1e-2,
            "reflow.atol": 1e-3,
        }
    )
    assert settings.eval_sampler(config) == Sampler("sde_heun", sde=SDE("SBDM", 0.5, "mean", 0.1))
    assert settings.reflow_sampler(config) == Sampler("dopri5", begin="zero", rtol=1e-2, atol=1e-3)
    config = changed(**{"eval.shift": 3.0, "eval.begin": "zero", "reflow.spacing": "trailing", "reflow.eta": 1.0})
    assert settings.eval_sampler(config) == Sampler("euler", shift=3.0, begin="zero")
    assert settings.reflow_sampler(config) == Sampler("ddim", spacing="trailing", eta=1.0)


def test_samplers_are_by_default_what_sampler_has() -> None:
    config = quickstart.get_config()
    assert settings.eval_sampler(config) == Sampler() and settings.reflow_sampler(config) == Sampler("ddim")


CHOICES = {
    "objective.name": "diffusion",
    "objective.convention": "reference",
    "objective.times": "logit_normal",
    "objective.begin": "last_timestep",
    "compute_dtype": "bfloat16",
    "remat": "blocks",
    "data.latents": "mean",
    "data.resize": "fixed",
    "data.crop": "random",
    "data.on_damage": "skip",
    "eval.sde.form": "SBDM",
    "eval.sde.last_step": "mean",
    "reflow.spacing": "quad",
    "train.optimizer": "adafactor",
    "train.schedule": "cosine",
    "train.first_moment_dtype": "bfloat16",
}


@pytest.mark.parametrize(("name", "other"), CHOICES.items(), ids=CHOICES.keys())
def test_a_choice_is_one_of_those_named(name: str, other: str) -> None:
    settings.check(changed(**{name: other}), MESH)
    with pytest.raises(InputError, match=rf"config\.{name}='magic' is unknown; use one of .*\b{other}\b"):
        settings.check(changed(**{name: "magic"}), MESH)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seed", -1, "is too small; use 0 or more"),
        ("data.held_out", -1, "use 0 or more"),
        ("data.image_width", -8, "use 0 or more"),
        ("data.num_train", 0, "use 1 or more"),
        ("data.caption_dropout", 1.5, r"is too large; use 1 or less"),
        ("data.num_workers", -1, "use 0 or more"),
        ("objective.sigma_min", -0.1, "use 0 or more"),
        ("lora.scale", 0.0, "use 1e-09 or more"),
        ("lora.conv_rank", -1, "use 0 or more"),
        ("lora.mlp_ratio", -0.1, "use 0 or more"),
        ("lora.self_attention_ratio", 1.5, "use 1 or less"),
        ("lora.cross_attention_ratio", 0.2, "both say the rank; set one to 0"),
        ("train.num_steps", 0, "use 1 or more"),
        ("train.batch_size", 0, "use 1 or more"),
        ("train.batch_size", -8, "use 1 or more"),
        ("train.accumulate", 0, "use 1 or more"),
        ("train.learning_rate", -1e-4, "use 0 or more"),
        ("train.learning_rate", float("nan"), "use 0 or more"),
        ("train.final_rate", 0.0, "use 1e-09 or more"),
        ("train.max_grad_norm", -1.0, "use 1e-09 or more"),
        ("train.ema_decay", 1.01, "use 1 or less"),
        ("train.b2", 1.0, "use 0.99999 or less"),
        ("train.max_bad_steps", 0, "use 1 or more"),
        ("train.checkpoints_kept", 0, "use 1 or more"),
        ("eval.every", 0, "use 1 or more"),
        ("eval.num_images", 1, "use 2 or more"),
        ("eval.seed", -1, "use 0 or more"),
        ("eval.guidance_rescale", 1.5, "use 1 or less"),
        ("reflow.guidance_rescale", -0.1, "use 0 or more"),
        ("eval.step_counts", (1, 0), "give whole numbers"),
        ("eval.step_counts", (), "give whole numbers"),
        ("train.profile_steps", (3,), "give the first and the last step"),
        ("train.profile_steps", (3, 2), "give the first and the last step"),
        ("data.sources", (), "give one or more"),
        ("data.sources", ("",), "such as image_folder:FOLDER"),
        ("data.weights", (1.0, 1.0), "give a positive number for each of 1 sources"),
        ("data.weights", (0.0,), "give a positive number for each of 1 sources"),
    ],
)
def test_values_that_no_run_can_have(name: str, value: object, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        settings.check(changed(**{name: value}), MESH)
    assert f"config.{name}={value}" in str(error.value)


@pytest.mark.parametrize("size", [4, 12])
def test_every_device_gets_as_many_examples(size: int) -> None:
    with pytest.raises(InputError, match=f"batch_size={size} does not divide over 8 devices; use a multiple of 8"):
        settings.check(changed(**{"train.batch_size": size}), MESH)


def test_the_parts_of_a_batch_divide_it() -> None:
    settings.check(changed(**{"train.accumulate": 4}), MESH)
    with pytest.raises(InputError, match=r"batch_size=32 .* 8 devices x 3 parts .* use a multiple of 24"):
        settings.check(changed(**{"train.accumulate": 3}), MESH)


@pytest.mark.parametrize(("data", "fsdp"), [(-1, 3), (3, -1), (8, 2), (0, -1), (1, 1)])
def test_a_mesh_takes_all_devices(tmp_path: Path, data: int, fsdp: int) -> None:
    assert len(jax.devices()) == 8
    with pytest.raises(InputError, match=rf"mesh\.data={data}, config\.mesh\.fsdp={fsdp} make no mesh of 8 devices"):
        train.train(changed(**{"mesh.data": data, "mesh.fsdp": fsdp}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_belongs_to_one_config(tmp_path: Path) -> None:
    settings.claim(tmp_path / "run", changed())
    file = tmp_path / "run" / "config.json"
    before = file.read_text()
    assert json.loads(before) == json.loads(changed().to_json())
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}')
    settings.claim(tmp_path / "run", changed())
    with pytest.raises(InputError) as error:
        settings.claim(tmp_path / "run", changed(**{"seed": 7, "train.learning_rate": 1e-5, "eval.every": 3}))
    assert "config.seed (0 there, 7 here), config.train.learning_rate (0.0003 there, 1e-05 here)" in str(error.value)
    assert "eval" not in str(error.value) and "another --workdir" in str(error.value)
    assert file.read_text() == before
    file.write_text(before.replace('"seed": 0', '"seed": 0, "sides": 6').replace('"compute_dtype": "float32",', ""))
    with pytest.raises(InputError, match=r"dtype \(None there, 'float32' here\), config\.sides \(6 there, None here\)"):
        settings.claim(tmp_path / "run", changed())


def test_a_start_that_took_no_step_may_be_mended(tmp_path: Path) -> None:
    settings.claim(tmp_path, changed(seed=7))
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints").mkdir()
    settings.claim(tmp_path, changed())
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0


def test_where_a_run_goes_on_and_what_it_tells_may_change(tmp_path: Path) -> None:
    settings.claim(tmp_path, changed())
    free = {
        "mesh.data": 1,
        "mesh.fsdp": 8,
        "remat": "gathers",
        "data.num_workers": 2,
        "data.max_damaged": 5,
        "train.log_every": 1,
        "train.profile_steps": (1, 2),
        "train.checkpoint_every": 7,
        "train.checkpoints_kept": 3,
        "train.checkpoint_period": 14,
        "train.max_bad_steps": 3,
        "eval.every": 7,
        "eval.step_counts": (3,),
        "wandb_project": "d2f",
    }
    settings.claim(tmp_path, changed(**free))
    now = settings.flat(json.loads((tmp_path / "config.json").read_text()))
    assert all(
        now[f"config.{key}"] == (list(value) if isinstance(value, tuple) else value) for key, value in free.items()
    )


@pytest.mark.parametrize("text", ['{"seed":', "[]", "7"])
def test_a_damaged_config_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "checkpoints" / "200").mkdir(parents=True)
    with pytest.raises(InputError, match=r"config\.json is damaged .* another --workdir"):
        settings.claim(tmp_path, changed())
    assert (tmp_path / "config.json").read_text() == text


def test_a_workdir_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        settings.claim(tmp_path / "file" / "run", changed())


def test_adapters_of_one_s_own_pictures() -> None:
    config = images.get_config("lora_base:image_folder:a:b")
    assert config.data.sources == ("image_folder:a:b",)
    assert config.lora == quickstart.get_config("lora_base").lora
    assert not images.get_config("image_folder:a:b").lora.enabled
