"""Makes a diffusers folder of a checkpoint that was finetuned with the paper's published code.

    python -m d2f_jax.convert --from=last.ckpt --base=PATH_OR_HUB_ID --to=FOLDER

That code (github.com/CompVis/diff2flow) leaves files of PyTorch Lightning. Of one that was trained with its
`FlowModelObj` the averaged UNet is taken, or the UNet itself where no average was kept, with LoRA merged in; all else
comes from `--base`, the Stable Diffusion that was finetuned; so does what the network predicts, epsilon or v, which the
file does not tell. The folder has the noise schedule that the file has, which may be the base's with zero terminal SNR,
and records that the flow is of `convention="reference"`.

A UNet of two latents side by side makes depth. That code puts the picture's after the noisy one, where here and in
diffusers it stands before: the first convolution's inputs change places. Its empty text is padded, which the folder
records (`config.task.pad_text`) and diffusers' MarigoldDepthPipeline does not: that needs the text's states set as its
`empty_text_embedding`. Pictures are estimated at 512 pixels of their longer side, that code's 384 x 512.
PyTorch is not needed.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from flax import nnx

from d2f_jax import program, torch_files, weights
from d2f_jax.alignment import Alignment
from d2f_jax.errors import InputError
from d2f_jax.models.unet import UNet2DConditionModel, UNetConfig
from d2f_jax.pipeline import Pipeline
from d2f_jax.schedule import NoiseSchedule
from d2f_jax.task import Task
from d2f_jax.torch_files import Tensor

_AVERAGED, _TRAINED = "ema_model.ema_model.net.", "model.net."
_TABLE = "model.alphas_cumprod_full"  # [T+1], the first is 1; no other objective of that code has it
_CONV_IN = "input_blocks.0.0.weight"
_DEPTH = Task("image_to_depth", pad_text=True)
_DEPTH_SHAPE = (384, 512)  # pixels
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def main() -> None:
    given = flags.FLAGS
    file, base, folder = (given[name].value for name in ("from", "base", "to"))
    if file is None or base is None or folder is None:
        raise InputError("--from=FILE.ckpt, --base=PATH_OR_HUB_ID and --to=FOLDER are all needed")
    pipeline = Pipeline.from_pretrained(base, variant=given.variant)
    convert(Path(file), pipeline, lora_scale=given.lora_scale).save_pretrained(folder)
    print(f"converted: {folder}")


def convert(file: Path, base: Pipeline, *, lora_scale: float = 1.0) -> Pipeline:
    """`base` with the file's UNet, noise schedule and convention. Raises InputError for a file that does not fit it."""
    content = torch_files.load(file)
    state = content.get("state_dict") if isinstance(content, dict) else None
    state = {name: x for name, x in state.items() if isinstance(x, Tensor)} if isinstance(state, dict) else {}
    if _TABLE not in state:
        raise InputError(f"{file} holds no {_TABLE}: it was not trained with the published code's FlowModelObj")
    prefix = _AVERAGED if any(name.startswith(_AVERAGED) for name in state) else _TRAINED
    net = merged({name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}, lora_scale)
    task, unet_config, vae = base.task, base.unet.config, base.vae.config
    if _CONV_IN in net and net[_CONV_IN].shape[1] == 2 * vae.latent_channels:
        net[_CONV_IN] = PictureFirst(net[_CONV_IN])
        height, width = (side // vae.downsampling for side in _DEPTH_SHAPE)
        unet_config = dataclasses.replace(unet_config, in_channels=2 * vae.latent_channels, sample_size=(height, width))
        task = _DEPTH
    keys = [weights.key_of(path) for path, _ in nnx.to_flat_state(nnx.state(base.unet))]
    unet = weights.fill(
        lambda rngs: UNet2DConditionModel(unet_config, dtype=base.unet.dtype, rngs=rngs),
        Published(file, net, dict(named(keys, unet_config))),
        fits="the UNet of --base",
    )
    config = _scheduler_config(file, base, state[_TABLE].read()[1:])
    return dataclasses.replace(
        base,
        unet=unet,
        schedule=NoiseSchedule.from_config(config),
        scheduler_config=config,
        alignment=Alignment(convention="reference"),
        task=task,
        _programs={},
    )


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A weight with LoRA: `W + scale B A`, where B of a convolution is 1x1."""

    weight: Tensor
    down: Tensor
    up: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def read(self) -> np.ndarray:
        up = self.up.read().reshape(self.up.shape[:2])
        return self.weight.read() + self.scale * np.tensordot(up, self.down.read(), 1)


@dataclasses.dataclass(frozen=True)
class NoBias:
    """Of an adapted linear layer: the published code leaves its bias out, also where Stable Diffusion has one."""

    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        return np.zeros(self.shape, np.float32)


@dataclasses.dataclass(frozen=True)
class PictureFirst:
    """The first convolution of two latents side by side, its inputs exchanged: in the file the picture's is second."""

    weight: "Weight"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def read(self) -> np.ndarray:
        return np.roll(self.weight.read(), self.shape[1] // 2, axis=1)


Weight = Tensor | Adapted | NoBias | PictureFirst


def merged(net: Mapping[str, Tensor], lora_scale: float) -> dict[str, Weight]:
    """Each layer of `W`, `A` and `B` as one weight and one bias."""
    layers = [name.removesuffix(".W.weight") for name in net if name.endswith(".W.weight")]
    parts = {f"{layer}.{part}" for layer in layers for part in ("W.weight", "W.bias", "A.weight", "B.weight")}
    found: dict[str, Weight] = {name: x for name, x in net.items() if name not in parts}
    for layer in layers:
        weight, down, up = (net.get(f"{layer}.{part}.weight") for part in "WAB")
        if weight is None or down is None or up is None or not _fit(weight, down, up):
            raise InputError(f"--from: the LoRA of {layer} is not whole, W with an A and a B that fit; copy it again")
        found[f"{layer}.weight"] = Adapted(weight, down, up, lora_scale)
        found[f"{layer}.bias"] = net.get(f"{layer}.W.bias") or NoBias(weight.shape[:1])
    return found


def _fit(weight: Tensor, down: Tensor, up: Tensor) -> bool:
    shapes = weight.shape[:1], weight.shape[1:], down.shape[:1]
    return shapes == (up.shape[:1], down.shape[1:], up.shape[1:2])


class Published(weights.Tensors):
    """The published UNet's tensors under our names; those that ours does not have keep their own."""

    def __init__(self, file: Path, tensors: dict[str, Weight], published: dict[str, str]) -> None:
        self.files = [file]
        ours = {name: key for key, name in published.items()}
        wanted = {name: x for name, x in tensors.items() if name in ours or not isinstance(x, NoBias)}
        self._tensors = {ours.get(name, name): x for name, x in wanted.items()}

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name].read()


def named(keys: Iterable[str], config: UNetConfig) -> Iterator[tuple[str, str]]:
    """Each of our keys with the published name."""
    places = _places(config)
    for key in keys:
        (place,) = (place for place in places if key.startswith(place + "."))
        rest = key.removeprefix(place + ".")
        if ".resnets." in place:
            layer, _, leaf = rest.partition(".")
            rest = f"{_RESNET[layer]}.{leaf}"
        yield key, f"{places[place]}.{rest}"


def _places(config: UNetConfig) -> dict[str, str]:
    """Where a part of the UNet is in the published one: its blocks are counted through all levels."""
    places = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    levels, number = range(len(config.block_out_channels)), 1
    for i in levels:
        for j in range(config.level("layers_per_block", i)):
            places[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            places[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    number = 0
    for i in levels:
        for j in range(config.level("layers_per_block", levels[-1] - i) + 1):
            places[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            places[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        last = 2 if config.up_block_types[i].startswith("CrossAttn") else 1
        places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{last}.conv"
    return places


def _scheduler_config(file: Path, base: Pipeline, alphas_cumprod: np.ndarray) -> dict[str, Any]:
    """The base's, with or without zero terminal SNR. Raises InputError where the file's schedule is neither."""
    predicts = base.schedule.prediction_type
    for zero_snr in (False,) if predicts == "epsilon" else (False, True):
        config = base.scheduler_config | {"rescale_betas_zero_snr": zero_snr}
        known = NoiseSchedule.from_config(config).alphas_cumprod
        if known.shape == alphas_cumprod.shape and np.allclose(known, alphas_cumprod, rtol=0, atol=1e-5):
            return config
    raise InputError(
        f"{file} has another noise schedule than --base, which predicts {predicts}; give the model that was finetuned"
    )


if __name__ == "__main__":
    flags.DEFINE_string("from", None, "The published code's checkpoint, such as logs/NAME/checkpoints/last.ckpt.")
    flags.DEFINE_string("base", None, "Diffusers folder or hub id of the Stable Diffusion that was finetuned.")
    flags.DEFINE_string("to", None, "Diffusers folder to write.")
    flags.DEFINE_string("variant", None, "Of the base's files, such as fp16.")
    flags.DEFINE_float("lora_scale", 1.0, "lora_cfg.lora_scale of the run, if it had one.")
    program.run(main)
