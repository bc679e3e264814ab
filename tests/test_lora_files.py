"""Adapters as files: ours bit for bit, and those of PyTorch's world by what they do there."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import safetensors.torch
import small
import torch
import twins
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from flax import nnx
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from d2f_jax import Pipeline, lora, lora_files, weights
from d2f_jax.alignment import Alignment
from d2f_jax.errors import InputError
from d2f_jax.lora import Adapter, Targets
from d2f_jax.lora_files import Learned
from d2f_jax.task import Task

EVERYTHING = Targets(
    self_attention_rank=2,
    cross_attention_rank=5,
    attention_out=True,
    conv_ratio=0.25,
    mlp_rank=3,
    first_layer=True,
    last_layer=True,
)
SCALE = 0.5
PEFT = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_pipeline(tmp_path_factory.mktemp("model"), **small.ATTENTION)


@functools.cache
def unet(model: Path) -> Any:
    return weights.load_unet(model)


def stirred(model: Path, targets: Targets) -> Any:
    """As after training: nothing is zero, and what is trained fully has moved."""
    trained = lora.init(nnx.state(unet(model)), jax.random.key(0), targets)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), trained)


INPUTS = {"sample": (2, 8, 8, 4), "text": (2, 5, 16)}


def ours(model: Path, trained: Any, scale: float) -> np.ndarray:
    merged = lora.merge(nnx.state(unet(model)), trained, scale=scale)
    network = nnx.merge(nnx.graphdef(unet(model)), merged)
    x, text = twins.random(*INPUTS["sample"]), twins.random(*INPUTS["text"], seed=1)
    return np.asarray(jax.jit(lambda: network(jnp.asarray(x), jnp.asarray(7.0), jnp.asarray(text)))())


@torch.no_grad()
def theirs(network: Any) -> np.ndarray:
    x, text = twins.random(*INPUTS["sample"]), twins.random(*INPUTS["text"], seed=1)
    return twins.nhwc(network(twins.nchw(x), 7, torch.from_numpy(text)).sample)


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


# Ours


@pytest.mark.parametrize(
    "targets", [EVERYTHING, Targets(conv_rank=2, condition_channels=3)], ids=["all", "conditional"]
)
def test_what_is_saved_comes_back_bit_for_bit(model: Path, tmp_path: Path, targets: Targets) -> None:
    trained = stirred(model, targets)
    lora_files.save(tmp_path / "adapters.safetensors", trained, targets, scale=1 / 3)
    loaded = lora_files.load(tmp_path / "adapters.safetensors", nnx.state(unet(model)))
    assert loaded.scale == 1 / 3
    assert_same(dict(sorted(loaded.trained.items())), dict(sorted(trained.items())))
    assert not list(tmp_path.glob("*.part"))


def test_what_they_learned_and_how_comes_back_too(model: Path, tmp_path: Path) -> None:
    file, targets = tmp_path / "file", Targets(conv_rank=2)
    how = Learned(Task("image_to_depth", start="image"), Alignment(convention="reference"), zero_terminal_snr=True)
    lora_files.save(file, stirred(model, targets), targets, scale=1.0, how=how)
    assert lora_files.learned(file) == how
    altered(file, lambda _, metadata: metadata.pop("zero_terminal_snr"))  # as it was before it told of that
    assert lora_files.learned(file) == dataclasses.replace(how, zero_terminal_snr=False)
    for layout in get_args(lora_files.Layout):
        lora_files.export(file, stirred(model, targets), nnx.state(unet(model)), scale=1.0, layout=layout, how=how)
        assert lora_files.learned(file) == how
    lora_files.export(file, stirred(model, targets), nnx.state(unet(model)), scale=1.0)
    assert lora_files.learned(file) is None  # as of files that other programs write


def altered(file: Path, alter: Any) -> Path:
    with safetensors.safe_open(file, framework="numpy") as handle:
        metadata, tensors = handle.metadata(), {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    alter(tensors, metadata)
    safetensors.numpy.save_file(tensors, file, metadata=metadata)
    return file


def test_every_tensor_at_fault_is_named_in_one_error(model: Path, tmp_path: Path) -> None:
    def alter(tensors: dict[str, Any], _: Any) -> None:
        del tensors["conv_in.bias"]
        tensors["stray"] = np.zeros(3, np.float32)
        tensors["conv_out.kernel"] = np.zeros((3, 3, 16, 5), np.float32)

    lora_files.save(tmp_path / "file", stirred(model, EVERYTHING), EVERYTHING, scale=1.0)
    with pytest.raises(InputError) as error:
        lora_files.load(altered(tmp_path / "file", alter), nnx.state(unet(model)))
    for said in (
        "missing conv_in.bias",
        "unexpected stray",
        "misshapen conv_out.kernel (3, 3, 16, 5)",
        "(3, 3, 16, 4)",
    ):
        assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_not_adapters(model: Path, tmp_path: Path) -> None:
    params = nnx.state(unet(model))
    (tmp_path / "text").write_text("no tensors")
    lora_files.save(tmp_path / "conv", stirred(model, EVERYTHING), EVERYTHING, scale=1.0)
    altered(tmp_path / "conv", lambda _, metadata: metadata.update(targets=json.dumps({"magic": 3})))
    safetensors.numpy.save_file({}, tmp_path / "empty")
    for name, said in (
        ("nowhere", "nowhere is missing"),
        ("text", "no safetensors file"),
        ("conv", "does not say what it holds"),
        ("empty", "missing every tensor"),
    ):
        with pytest.raises(InputError, match=said) as error:
            lora_files.load(tmp_path / name, params)
        assert "\n" not in str(error.value)


# PyTorch's


@pytest.mark.parametrize("layout", ["peft", "kohya"])
@pytest.mark.parametrize("linear", [False, True], ids=["SD 1.x", "SD 2.x"])
def test_diffusers_loads_what_is_exported(tmp_path: Path, layout: Any, linear: bool) -> None:
    model = small.write_pipeline(tmp_path / "model", **small.ATTENTION, use_linear_projection=linear)
    trained = stirred(model, EVERYTHING)
    beside = lora_files.export(tmp_path / PEFT, trained, nnx.state(unet(model)), scale=SCALE, layout=layout)
    pipeline = small.torch_pipeline(model)
    before = theirs(pipeline.unet)
    assert beside is not None
    told = pipeline.unet.load_state_dict(load_file(beside), strict=False)
    assert not told.unexpected_keys
    pipeline.load_lora_weights(tmp_path / PEFT)
    expected = ours(model, trained, SCALE)
    assert np.abs(before - expected).max() > 0.05 * np.abs(expected).max()
    twins.assert_close(expected, theirs(pipeline.unet), tolerance=1e-5)


def test_a_pipeline_with_the_file_draws_what_the_merged_one_draws(model: Path, tmp_path: Path) -> None:
    trained = stirred(model, Targets(self_attention_rank=2, cross_attention_rank=4, conv_rank=3, mlp_rank=1))
    params = nnx.state(unet(model))
    assert lora_files.export(tmp_path / PEFT, trained, params, scale=SCALE) is None
    with_file, merged = small.torch_pipeline(model), small.torch_pipeline(model)
    with_file.load_lora_weights(tmp_path / PEFT)
    network = nnx.merge(nnx.graphdef(unet(model)), lora.merge(params, trained, scale=SCALE))
    weights.save_pretrained(network, tmp_path / "unet")
    merged.unet = type(merged.unet).from_pretrained(tmp_path / "unet")

    def draw(pipeline: Any) -> np.ndarray:
        latents = twins.nchw(twins.random(1, 8, 8, 4))
        return pipeline("a cube", latents=latents, num_inference_steps=3, guidance_scale=3.0, output_type="np").images

    assert np.abs(draw(with_file) - draw(small.torch_pipeline(model))).max() > 0.02
    np.testing.assert_allclose(draw(with_file), draw(merged), atol=1e-4)


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_all_ranks_of_a_file_are_one(model: Path, tmp_path: Path, layout: Any) -> None:
    trained = stirred(model, EVERYTHING)
    assert len({entry.b.shape[0] for entry in trained.values() if isinstance(entry, Adapter)}) > 2
    lora_files.export(tmp_path / PEFT, trained, nnx.state(unet(model)), scale=SCALE, layout=layout)
    tensors = safetensors.numpy.load_file(tmp_path / PEFT)
    downs = {x.shape[0] for name, x in tensors.items() if "lora_A" in name or "lora_down" in name}
    alphas = {float(x) for name, x in tensors.items() if name.endswith(".alpha")}
    assert downs == {16} and alphas == ({16.0} if layout == "kohya" else set())  # conv_in's, of 16 outputs


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_what_is_exported_with_whole_layers_loads_here_too(model: Path, tmp_path: Path, layout: Any) -> None:
    trained, params = stirred(model, EVERYTHING), nnx.state(unet(model))
    file = tmp_path / "moved" / PEFT
    beside = lora_files.export(file, trained, params, scale=SCALE, layout=layout)
    found = lora.merge(params, lora_files.load(file, params).trained, scale=1.0)
    for ours, expected in zip(*map(jax.tree.leaves, (found, lora.merge(params, trained, scale=SCALE))), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-6)
    assert beside is not None
    whole = safetensors.numpy.load_file(beside)
    name = min(whole)
    safetensors.numpy.save_file(whole | {name: np.zeros(3, np.float32), "other": np.zeros(3, np.float32)}, beside)
    with pytest.raises(
        InputError, match=rf"{beside} does not fit this model: unexpected other; misshapen {name} \(3,\)"
    ):
        lora_files.load(file, params)
    beside.unlink()
    with pytest.raises(InputError, match=f"{beside} is missing, the biases and norms that were trained with {PEFT}"):
        lora_files.load(file, params)


@pytest.mark.parametrize("layout", ["peft", "kohya"])
def test_what_is_exported_loads_here_too(model: Path, tmp_path: Path, layout: Any) -> None:
    trained = stirred(model, Targets(self_attention_rank=2, conv_rank=3, mlp_rank=5))
    lora_files.export(tmp_path / PEFT, trained, nnx.state(unet(model)), scale=SCALE, layout=layout)
    loaded = lora_files.load(tmp_path / PEFT, nnx.state(unet(model)))
    assert loaded.scale == 1 and loaded.trained.keys() == trained.keys()
    for path, entry in loaded.trained.items():
        assert isinstance(entry, Adapter)
        np.testing.assert_allclose(lora.product(entry), SCALE * lora.product(trained[path]), atol=1e-6)


ADAPTED = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "ff.net.0.proj", "conv_in"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}


def adapted(model: Path, *networks: str, **config: Any) -> Any:
    """diffusers' pipeline with random adapters by PEFT."""
    pipeline = small.torch_pipeline(model)
    torch.manual_seed(0)
    for name in networks:
        options = {"r": 4, "init_lora_weights": False, "target_modules": ADAPTED[name]} | config
        inject_adapter_in_model(LoraConfig(**options), getattr(pipeline, name))
    return pipeline


def write(folder: Path, pipeline: Any, *networks: str, names: str = "peft", told: bool = True) -> Path:
    """The adapters in a file, as diffusers' scripts do it now, did it before, or as kohya's do; `told` is metadata."""
    states = {name: get_peft_model_state_dict(getattr(pipeline, name)) for name in networks}
    if names == "kohya":
        tensors, called = {}, {"A": "lora_down", "B": "lora_up"}
        for name, state in states.items():
            prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[name]
            alpha = torch.tensor(float(getattr(pipeline, name).peft_config["default"].lora_alpha))
            for key, x in state.items():
                module, part = key.rsplit(".lora_", 1)
                module = prefix + module.replace(".", "_")
                tensors |= {f"{module}.{called[part[0]]}.weight": x, f"{module}.alpha": alpha.clone()}
        safetensors.torch.save_file(tensors, folder / PEFT)
        return folder / PEFT
    if names == "scripts":
        states = {name: convert_state_dict_to_diffusers(state) for name, state in states.items()}
    metadata = _collate_lora_metadata({name: getattr(pipeline, name) for name in networks}) if told else {}
    StableDiffusionPipeline.save_lora_weights(
        folder, **{f"{name}_lora_layers": state for name, state in states.items()}, **metadata
    )
    return folder / PEFT


def test_a_file_that_peft_has_made_loads_here(model: Path, tmp_path: Path) -> None:
    pipeline = adapted(model, "unet", lora_alpha=4)
    loaded = lora_files.load(write(tmp_path, pipeline, "unet", told=False), nnx.state(unet(model)))
    assert len(loaded.trained) > 20
    twins.assert_close(ours(model, loaded.trained, loaded.scale), theirs(pipeline.unet), tolerance=1e-5)


@pytest.mark.parametrize("network", ["unet", "text_encoder"])
def test_a_folder_that_peft_has_written_loads_here(model: Path, tmp_path: Path, network: str) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=10, init_lora_weights=False, target_modules=ADAPTED[network])
    pipeline = small.torch_pipeline(model)
    wrapped = peft.get_peft_model(getattr(pipeline, network), config)
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    found = Pipeline.from_pretrained(model).with_lora(file)
    if network == "unet":
        x, text = twins.random(*INPUTS["sample"]), twins.random(*INPUTS["text"], seed=1)
        ours, expected = found.unet(jnp.asarray(x), jnp.asarray(7.0), jnp.asarray(text)), theirs(wrapped)
    else:
        ids = found.tokenize(["a red cube"])
        ours = found.text_encoder(jnp.asarray(ids))
        with torch.no_grad():
            expected = wrapped(torch.from_numpy(ids).long()).last_hidden_state.numpy()
    twins.assert_close(np.asarray(ours), expected, tolerance=1e-5)
    (tmp_path / "adapter_config.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(InputError, match=r"PEFT has written adapter_config\.json beside it, which tells its scale"):
        Pipeline.from_pretrained(model).with_lora(file)


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_names_of_early_diffusers_are_known(model: Path, tmp_path: Path, prefix: str) -> None:
    trained = stirred(model, Targets(self_attention_rank=2, cross_attention_rank=2, attention_out=True))
    params = nnx.state(unet(model))
    lora_files.export(tmp_path / PEFT, trained, params, scale=SCALE, layout="peft")

    def early(name: str) -> str:
        layer, part = name.removeprefix("unet.").rsplit(".lora_", 1)
        attention, projection = layer.removesuffix(".0").rsplit(".", 1)
        return f"{prefix}{attention}.processor.{projection}_lora.{'down' if part[0] == 'A' else 'up'}.weight"

    tensors = {early(name): x for name, x in load_file(tmp_path / PEFT).items()}
    safetensors.torch.save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    loaded = lora_files.load(tmp_path / "pytorch_lora_weights.safetensors", params)
    assert loaded.trained.keys() == trained.keys()
    twins.assert_close(ours(model, loaded.trained, loaded.scale), ours(model, trained, SCALE), tolerance=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_q": 3, r"down_blocks\.0\.res.*1": 9, "^conv_in": 0.5}},
    ],
    ids=["alpha", "rslora", "patterns"],
)
def test_pefts_alpha_is_a_scale(model: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    pipeline = adapted(model, "unet", lora_alpha=10, **changes)
    file = write(tmp_path, pipeline, "unet")
    loaded = lora_files.load(file, nnx.state(unet(model)))
    found = ours(model, loaded.trained, loaded.scale)
    twins.assert_close(found, theirs(pipeline.unet), tolerance=1e-5)
    again = small.torch_pipeline(model)
    again.load_lora_weights(file)
    twins.assert_close(found, theirs(again.unet), tolerance=1e-5)
    altered(file, lambda _, metadata: metadata.pop("lora_adapter_metadata"))
    untold = lora_files.load(file, nnx.state(unet(model)))
    assert np.abs(found - ours(model, untold.trained, untold.scale)).max() > 0.05 * np.abs(found).max()


@pytest.mark.parametrize("names", ["peft", "scripts", "kohya"])
@pytest.mark.parametrize("networks", [("unet", "text_encoder"), ("text_encoder",)], ids=["both", "text"])
def test_adapters_of_the_text_encoder_load_too(
    model: Path, tmp_path: Path, names: str, networks: tuple[str, ...]
) -> None:
    pipeline = adapted(model, *networks, lora_alpha=10)
    file = write(tmp_path, pipeline, *networks, names=names)
    before, found = Pipeline.from_pretrained(model), Pipeline.from_pretrained(model).with_lora(file)
    ids = found.tokenize(["a red cube", "a cone"])

    def states(pipeline: Pipeline) -> np.ndarray:
        return np.asarray(pipeline.text_encoder(jnp.asarray(ids)))

    with torch.no_grad():
        expected = pipeline.text_encoder(torch.from_numpy(ids).long()).last_hidden_state.numpy()
    twins.assert_close(states(found), expected, tolerance=1e-5)
    assert np.abs(states(before) - expected).max() > 0.05 * np.abs(expected).max()
    x, text = twins.random(*INPUTS["sample"]), twins.random(*INPUTS["text"], seed=1)
    drawn = found.unet(jnp.asarray(x), jnp.asarray(7.0), jnp.asarray(text))
    twins.assert_close(drawn, theirs(pipeline.unet), tolerance=1e-5)
    with pytest.raises(InputError, match=r"unexpected (lora_te_text_model|text_encoder)"):
        lora_files.load(file, nnx.state(unet(model)))


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("{", "its lora_adapter_metadata cannot be read"),
        ("[1]", "its lora_adapter_metadata cannot be read"),
        ({"unet.lora_alpha": "much"}, "could not convert string to float: 'much'"),
        ({"unet.lora_alpha": 4, "unet.alpha_pattern": {"(": 4}}, "its lora_adapter_metadata cannot be read"),
        (
            {"unet.lora_alpha": 4, "unet.init_lora_weights": "pissa"},
            "init_lora_weights='pissa' has changed the base, too",
        ),
    ],
)
def test_metadata_that_tells_no_scale(model: Path, tmp_path: Path, told: Any, said: str) -> None:
    file = write(tmp_path, adapted(model, "unet", lora_alpha=4), "unet")
    text = told if isinstance(told, str) else json.dumps(told)
    altered(file, lambda _, metadata: metadata.update(lora_adapter_metadata=text))
    with pytest.raises(InputError, match=said) as error:
        lora_files.load(file, nnx.state(unet(model)))
    assert "\n" not in str(error.value) and str(file) in str(error.value)


def test_kohyas_alpha_is_a_scale(model: Path, tmp_path: Path) -> None:
    def alter(tensors: dict[str, Any], _: Any) -> None:
        tensors.update({name: np.asarray(x / 4) for name, x in tensors.items() if name.endswith(".alpha")})

    trained = stirred(model, Targets(conv_rank=3))
    lora_files.export(tmp_path / PEFT, trained, nnx.state(unet(model)), scale=1.0, layout="kohya")
    loaded = lora_files.load(altered(tmp_path / PEFT, alter), nnx.state(unet(model)))
    pipeline = small.torch_pipeline(model)
    pipeline.load_lora_weights(tmp_path / PEFT)
    expected = ours(model, trained, 0.25)
    twins.assert_close(ours(model, loaded.trained, loaded.scale), expected, tolerance=1e-5)
    twins.assert_close(expected, theirs(pipeline.unet), tolerance=1e-5)


def test_faults_of_a_foreign_file_are_told_together(model: Path, tmp_path: Path) -> None:
    def alter(tensors: dict[str, Any], _: Any) -> None:
        del tensors["unet.conv_in.lora_B.weight"]
        tensors["text_encoder.q.lora_A.weight"] = np.zeros((2, 2), np.float32)
        tensors["unet.conv_out.lora_A.weight"] = np.zeros((3, 16, 1, 1), np.float32)
        name = "down_blocks.0.resnets.0.conv1"
        tensors[f"lora_unet_{name.replace('.', '_')}.lora_down.weight"] = tensors[f"unet.{name}.lora_A.weight"]
        tensors["unet.mid_block.resnets.0.conv1.lora_A.weight"] = np.zeros((), np.float32)
        tensors["unet.mid_block.resnets.0.conv2.alpha"] = np.zeros(2, np.float32)

    lora_files.export(tmp_path / PEFT, stirred(model, Targets(conv_rank=3)), nnx.state(unet(model)), scale=1.0)
    with pytest.raises(InputError) as error:
        lora_files.load(altered(tmp_path / PEFT, alter), nnx.state(unet(model)))
    for said in (
        "missing conv_in up",
        "unexpected text_encoder.q.lora_A.weight",
        "misshapen conv_out (3, 16, 1, 1)",
        "down_blocks.0.resnets.0.conv1 by two names",
        "misshapen mid_block.resnets.0.conv1 ()",
        "misshapen mid_block.resnets.0.conv2 alpha (2,)",
    ):
        assert said in str(error.value)


def test_what_no_lora_file_can_hold_is_refused(model: Path, tmp_path: Path) -> None:
    conditional = stirred(model, Targets(conv_rank=2, condition_channels=3))
    with pytest.raises(InputError, match="depends on a condition, which no LoRA file can hold; use save"):
        lora_files.export(tmp_path / PEFT, conditional, nnx.state(unet(model)), scale=1.0)
    assert not list(tmp_path.iterdir())
