"""Checkpoints of the paper's published code: files of its shape, whose UNet computes the same in PyTorch as here."""

import dataclasses
import enum
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch
import twins
from flax import nnx
from torch import nn

from d2f_jax import InputError, Pipeline, load_unet, torch_files, weights
from d2f_jax.alignment import Alignment
from d2f_jax.convert import convert, named
from d2f_jax.models.unet import UNet2DConditionModel
from d2f_jax.schedule import NoiseSchedule
from d2f_jax.task import Task

UNET = twins.SMALL_UNET | {"cross_attention_dim": 16, "layers_per_block": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Stable Diffusion that was finetuned, which predicts v."""
    return small.write_pipeline(tmp_path_factory.mktemp("base"), **UNET)


@pytest.fixture(scope="module")
def base(model: Path) -> Pipeline:
    return Pipeline.from_pretrained(model)


@pytest.fixture
def finetuned() -> diffusers.UNet2DConditionModel:
    """Other weights than the base's."""
    unet = twins.unet(**small.UNET | UNET)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return unet


def published(state: dict[str, torch.Tensor], base: Pipeline) -> dict[str, torch.Tensor]:
    """The state of diffusers' UNet under the published code's names; an adapted layer's are its own and W, A, B."""
    keys = [weights.key_of(path) for path, _ in nnx.to_flat_state(nnx.state(base.unet))]
    layers = {key.rpartition(".")[0]: name.rpartition(".")[0] for key, name in named(keys, base.unet.config)}
    result = {}
    for key, tensor in state.items():
        layer = max((layer for layer in layers if key.startswith(layer + ".")), key=len)
        result[layers[layer] + key.removeprefix(layer)] = tensor
    return result


def table(base: Pipeline, zero_snr: bool = False) -> torch.Tensor:
    schedule = NoiseSchedule.from_config(base.scheduler_config | {"rescale_betas_zero_snr": zero_snr})
    return torch.cat([torch.ones(1), torch.from_numpy(np.array(schedule.alphas_cumprod))])


class Kind(enum.Enum):
    ONE = 1


class Settings(dict):
    """As Lightning and OmegaConf keep a run's: classes that are not there where the file is read."""


class Trap:
    """Runs when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.place,)


def write(file: Path, state: dict[str, torch.Tensor]) -> Path:
    settings = Settings(
        lr=1e-5, kind=Kind.ONE, names={"a"}, nested=types.SimpleNamespace(deep=[1]), trap=Trap(file.parent / "ran")
    )
    torch.save({"epoch": 1, "state_dict": state, "optimizer_states": [{"step": 3}], "hyper_parameters": settings}, file)
    return file


def in_lightning(net: dict[str, torch.Tensor], tables: torch.Tensor, prefix: str = "model.net.") -> dict[str, Any]:
    frozen = {"first_stage.encoder.conv_in.weight": torch.zeros(2), "ema_model.step": torch.tensor(7)}
    return frozen | {"model.alphas_cumprod_full": tables} | {prefix + name: x for name, x in net.items()}


def check_parity(ours: UNet2DConditionModel, theirs: nn.Module) -> None:
    sample, text, time = twins.random(2, 8, 8, 4), twins.random(2, 24, 16), np.array([3.0, 700.5], np.float32)
    with torch.no_grad():
        expected = theirs(twins.nchw(sample), torch.from_numpy(time), torch.from_numpy(text)).sample
    twins.assert_close(nnx.jit(lambda unet, *x: unet(*x))(ours, sample, time, text), twins.nhwc(expected))


def test_names_are_those_that_diffusers_knows(model: Path, base: Pipeline, finetuned: Any) -> None:
    """The published UNet is Stable Diffusion's own, which diffusers reads from single files."""
    net = published(finetuned.state_dict(), base)
    # After a residual block, or after a residual block and attention: diffusers reads it at either place.
    assert {"output_blocks.2.1.conv.weight", "output_blocks.5.2.conv.weight"} <= net.keys()
    tensors = {f"model.diffusion_model.{name}": x for name, x in net.items()}
    read = diffusers.UNet2DConditionModel.from_single_file(tensors, config=str(model / "unet"))
    for name, tensor in finetuned.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name


def test_the_program_takes_the_average(model: Path, base: Pipeline, finetuned: Any, tmp_path: Path) -> None:
    net = published(finetuned.state_dict(), base)
    state = in_lightning({name: torch.zeros_like(x) for name, x in net.items()}, table(base, zero_snr=True))
    state |= {f"ema_model.ema_model.net.{name}": x for name, x in net.items()}
    file, out = write(tmp_path / "last.ckpt", state), tmp_path / "out"
    command = [sys.executable, "-m", "d2f_jax.convert", f"--from={file}", f"--base={model}", f"--to={out}"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == f"converted: {out}\n"
    assert not (tmp_path / "ran").exists()
    check_parity(load_unet(out), finetuned)
    pipeline = Pipeline.from_pretrained(out)
    assert pipeline.alignment == Alignment(convention="reference")
    assert pipeline.schedule.alphas_cumprod[-1] == 0 < base.schedule.alphas_cumprod[-1]
    np.testing.assert_array_equal(pipeline.vae.encoder.conv_in.kernel[...], base.vae.encoder.conv_in.kernel[...])
    small.torch_pipeline(out)  # loads


class Lora(nn.Module):
    """The published code's layer: a linear one loses its bias."""

    def __init__(self, layer: nn.Module, make: Callable[[int, int, bool], nn.Module], rank: int, scale: float) -> None:
        super().__init__()
        outputs, inputs = layer.weight.shape[:2]
        self.W, self.A, self.scale = layer, make(inputs, rank, True), scale
        self.B = make(rank, outputs, False)
        if isinstance(layer, nn.Linear):
            layer.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.W(x) + self.scale * self.B(self.A(x))


def conv(stride: int) -> Callable[[int, int, bool], nn.Module]:
    def make(inputs: int, outputs: int, first: bool) -> nn.Module:
        options = {"stride": stride, "padding": 1} if first else {}
        return nn.Conv2d(inputs, outputs, 3 if first else 1, bias=False, **options)

    return make


@pytest.fixture
def seeing() -> diffusers.UNet2DConditionModel:
    """The published code's UNet of depth: the noisy latent, and the picture's after it."""
    return twins.unet(**small.UNET | UNET | {"in_channels": 8})


def test_depth_sees_the_picture_and_the_text_as_the_published_code(
    base: Pipeline, seeing: Any, model: Path, tmp_path: Path
) -> None:
    seeing.conv_in = Lora(seeing.conv_in, conv(1), rank=3, scale=1.0)
    file = write(tmp_path / "depth.ckpt", in_lightning(published(seeing.state_dict(), base), table(base)))
    convert(file, base).save_pretrained(tmp_path / "out")
    ours = Pipeline.from_pretrained(tmp_path / "out")
    assert ours.task == Task("image_to_depth", pad_text=True) and ours.alignment == Alignment(convention="reference")
    assert ours.resolution == 512 and ours.unet.config.sample_shape == (192, 256)  # this VAE halves sides
    ids = ours.tokenize([""])
    assert ids.shape == (1, 24)  # all that the text encoder takes
    theirs = small.torch_pipeline(model).text_encoder
    noise, picture = (twins.random(2, 8, 8, 4, seed=seed) for seed in (0, 1))
    time = np.array([3.0, 700.5], np.float32)
    with torch.no_grad():
        text = theirs(torch.from_numpy(ids).long())[0]
        input_BxCxHxW = torch.cat([twins.nchw(noise), twins.nchw(picture)], 1)
        expected = seeing(input_BxCxHxW, torch.from_numpy(time), text.repeat(2, 1, 1)).sample
    x = ours.task.network_input(jnp.asarray(noise), jnp.asarray(picture))
    states = nnx.jit(lambda encoder, ids: encoder(ids))(ours.text_encoder, np.repeat(ids, 2, 0))
    twins.assert_close(nnx.jit(lambda unet, *x: unet(*x))(ours.unet, x, time, states), twins.nhwc(expected))

    marigold = diffusers.MarigoldDepthPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32)
    marigold.set_progress_bar_config(disable=True)
    marigold.empty_text_embedding = text
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    wanted = marigold(
        twins.nchw(images / np.float32(255)),
        num_inference_steps=1,
        processing_resolution=0,
        latents=twins.nchw(noise),
    ).prediction
    exact = ours.by_convention("exact")
    found = exact.depth(images, num_steps=1, resolution=0, noise=jnp.asarray(noise), sampler="ddim")
    np.testing.assert_allclose(found, np.asarray(wanted)[..., 0], atol=2e-5)


def test_half_precision_and_no_average(base: Pipeline, finetuned: Any, tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        net = published(finetuned.to(dtype).state_dict(), base)
        converted = convert(write(tmp_path / f"{dtype}.ckpt", in_lightning(net, table(base))), base)
        np.testing.assert_array_equal(converted.schedule.alphas_cumprod, base.schedule.alphas_cumprod)
        check_parity(converted.unet, finetuned.float())


def test_lora_is_merged(base: Pipeline, finetuned: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)

    def linear(inputs: int, outputs: int, _: bool) -> nn.Module:
        return nn.Linear(inputs, outputs, bias=False)

    block = finetuned.down_blocks[0].attentions[0].transformer_blocks[0]
    for parent, name, make in (
        (block.attn1, "to_q", linear),
        (block.attn1.to_out, "0", linear),  # has a bias, and loses it
        (block.ff.net, "2", linear),
        (finetuned.down_blocks[0].resnets[0], "conv1", conv(1)),
        (finetuned.down_blocks[0].downsamplers[0], "conv", conv(2)),
    ):
        setattr(parent, name, Lora(getattr(parent, name), make, rank=3, scale=0.7))
    file = write(tmp_path / "lora.ckpt", in_lightning(published(finetuned.state_dict(), base), table(base)))
    check_parity(convert(file, base, lora_scale=0.7).unet, finetuned)
    with pytest.raises(AssertionError, match="off by"):
        check_parity(convert(file, base, lora_scale=1.0).unet, finetuned)


def test_what_does_not_fit_is_refused(base: Pipeline, finetuned: Any, tmp_path: Path) -> None:
    net = published(finetuned.state_dict(), base)
    whole = in_lightning(net, table(base))
    other = {name: x for name, x in whole.items() if name != "model.alphas_cumprod_full"}
    with pytest.raises(InputError, match=r"not trained with the published code's FlowModelObj"):
        convert(write(tmp_path / "fm.ckpt", other), base)
    with pytest.raises(InputError, match="another noise schedule than --base"):
        convert(write(tmp_path / "schedule.ckpt", whole | {"model.alphas_cumprod_full": table(base)[:-1]}), base)
    epsilon = {**base.scheduler_config, "prediction_type": "epsilon"}
    wrong = dataclasses.replace(base, scheduler_config=epsilon, schedule=NoiseSchedule.from_config(epsilon))
    with pytest.raises(InputError, match="another noise schedule than --base, which predicts epsilon; give the model"):
        convert(write(tmp_path / "epsilon.ckpt", whole | {"model.alphas_cumprod_full": table(base, True)}), wrong)
    adapted = {f"model.net.time_embed.0.{part}.weight": torch.zeros(64, 16) for part in "WA"}
    with pytest.raises(InputError, match=r"the LoRA of time_embed\.0 is not whole, W with an A and a B that fit"):
        convert(write(tmp_path / "lora.ckpt", whole | adapted), base)
    del whole["model.net.out.2.bias"]
    whole["model.net.input_blocks.0.0.weight"] = torch.zeros(16, 12, 3, 3)
    whole["model.net.input_blocks.1.0.in_layers.2.gamma.weight"] = torch.zeros(3)
    with pytest.raises(InputError) as error:
        convert(write(tmp_path / "other.ckpt", whole), base)
    for fault in (
        "missing conv_out.bias",
        "unexpected input_blocks.1.0.in_layers.2.gamma.weight",
        "misshapen conv_in.weight (16, 12, 3, 3), should be (16, 4, 3, 3)",
    ):
        assert fault in str(error.value)


def test_files_that_are_not_pytorch_s(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.ckpt cannot be read"):
        torch_files.load(tmp_path / "nothing.ckpt")
    (tmp_path / "text.ckpt").write_text("weights")
    with pytest.raises(InputError, match=r"text\.ckpt is no PyTorch file"):
        torch_files.load(tmp_path / "text.ckpt")
    torch.save([torch.zeros(1000)], tmp_path / "cut.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "cut.ckpt").read_bytes()[:2000])
    with pytest.raises(InputError, match=r"cut\.ckpt is no PyTorch file, or damaged"):
        torch_files.load(tmp_path / "cut.ckpt")
    torch.save([torch.full((1000,), 0.5)], tmp_path / "bit.ckpt")
    content = (tmp_path / "bit.ckpt").read_bytes()
    number = torch.full((1,), 0.5).numpy().tobytes()
    (tmp_path / "bit.ckpt").write_bytes(content.replace(number * 9, b"\1" + (number * 9)[1:], 1))
    with pytest.raises(InputError, match=r"bit\.ckpt is damaged"):
        torch_files.load(tmp_path / "bit.ckpt")[0].read()


@pytest.mark.parametrize(
    "said",
    [
        {"offset": -1},
        {"offset": 4},
        {"strides": (-1,)},
        {"strides": (-(2**40),)},
        {"shape": (9,)},
        {"shape": (-3,)},
        {"strides": (1, 1)},
        {"strides": (1.5,)},
    ],
)
def test_a_tensor_that_lies_outside_its_bytes_is_refused(said: dict[str, Any], tmp_path: Path) -> None:
    torch.save([torch.zeros(8)[:5]], tmp_path / "x.pt")
    (tensor,) = torch_files.load(tmp_path / "x.pt")
    assert tensor.read().shape == (5,)
    with pytest.raises(InputError, match=r"x\.pt is damaged \(.*data/0 is too short\); copy it again"):
        dataclasses.replace(tensor, **said).read()


def test_views_and_dtypes_are_read_as_pytorch_reads_them(tmp_path: Path) -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    saved = {
        "transposed": x.transpose(0, 2),
        "part": x[1:, ::2],
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "parameter": nn.Parameter(x.half()),
        "bool": x > 5,
        "bfloat16": x.bfloat16(),
    }
    torch.save(saved, tmp_path / "x.pt")
    for name, tensor in torch_files.load(tmp_path / "x.pt").items():
        read, expected = tensor.read(), saved[name].detach()
        assert read.shape == tuple(expected.shape) and tensor.shape == read.shape
        if name == "bfloat16":
            assert read.dtype == jnp.bfloat16
            read, expected = read.astype(np.float32), expected.float()
        np.testing.assert_array_equal(read, expected.numpy(), strict=True)
