"""What a network makes of what: a picture of a text, or depth of a picture.

Depth is drawn as a picture is: in the latents of the same VAE, from noise, or from the latent of the picture itself.
Latents are [B, H, W, C], as the network sees them, that is scaled.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from d2f_jax.errors import InputError
from d2f_jax.models.layers import shapes_of
from d2f_jax.models.unet import UNet2DConditionModel

Name = Literal["text_to_image", "image_to_depth"]
Start = Literal["noise", "image"]


@dataclasses.dataclass(frozen=True)
class Task:
    """Of "image_to_depth" the picture's latent stands before the network's input (Marigold, arXiv 2312.02145).

    That is `concatenate`. With `adapters` the low-rank adapters of convolutions see it, too or instead (LoRAdapter,
    arXiv 2405.07913; `d2f_jax.lora.Conditional`). A flow may `start` at noise or at the picture's latent, brought
    towards noise by `start_noise`: from 0, the latent itself, along the cosine schedule to 1, noise alone (the "noised
    data" of Diff2Flow's published code). The empty text beside the picture is two tokens, as Marigold has it, or with
    `pad_text` filled up to the model's length, as Diff2Flow's published code has it. Raises InputError for what does
    not go together.
    """

    name: Name = "text_to_image"
    concatenate: bool = True
    adapters: bool = False
    start: Start = "noise"
    start_noise: float = 0.0
    pad_text: bool = False

    def __post_init__(self) -> None:
        for what, value, allowed in (("name", self.name, get_args(Name)), ("start", self.start, get_args(Start))):
            if value not in allowed:
                raise InputError(f"task {what}={value!r} is unknown; use one of {', '.join(allowed)}")
        if not 0 <= self.start_noise <= 1:
            raise InputError(f"task start_noise={self.start_noise} is not between 0, the picture, and 1, noise")
        if self.start_noise and self.start == "noise":
            raise InputError(
                f"task start_noise={self.start_noise} is of start='image'; leave it 0 for a start at noise"
            )
        if not self.of_pictures and (self.start != "noise" or not self.concatenate or self.adapters):
            raise InputError(
                "task text_to_image has no picture to start at, concatenate or adapt to; leave it as it is"
            )
        if not self.of_pictures and self.pad_text:
            raise InputError("task pad_text=True is of image_to_depth; captions are padded anyway, leave it False")
        if self.of_pictures and self.start == "noise" and not (self.concatenate or self.adapters):
            raise InputError("task image_to_depth would not see the picture; concatenate it, or start at it")

    @property
    def of_pictures(self) -> bool:
        """Whether there is a picture that the result is of."""
        return self.name != "text_to_image"

    @property
    def pads(self) -> bool:
        """Whether texts are filled up to the model's length, as captions always are."""
        return not self.of_pictures or self.pad_text

    @property
    def inputs(self) -> int:
        """How many latents the network takes side by side."""
        return 2 if self.of_pictures and self.concatenate else 1

    def check_ensemble(self, members: int) -> None:
        """Raises InputError for several estimates of which each would be the same."""
        if members > 1 and self.start == "image" and not self.start_noise:
            raise InputError(
                f"ensemble={members}: a flow from the picture itself, without noise, makes one estimate; use 1"
            )

    def network_input(self, x: jax.Array, picture: jax.Array | None) -> jax.Array:
        """The state, and before it the picture's latent if it is concatenated."""
        if picture is None or self.inputs == 1:
            return x
        return jnp.concatenate([picture.astype(x.dtype), x], axis=-1)

    def source(self, noise: jax.Array, picture: jax.Array | None) -> jax.Array:
        """Where the flow starts, at t = 0."""
        if picture is None or self.start == "noise":
            return noise
        angle = 0.5 * jnp.pi * self.start_noise
        return jnp.cos(angle) * picture + jnp.sin(angle) * noise


TEXT_TO_IMAGE = Task()


def widened(unet: UNet2DConditionModel, inputs: int) -> UNet2DConditionModel:
    """The same network for `inputs` latents side by side: each is given the first convolution, divided by their number.

    So does Diff2Flow's published code. Given the same latent several times, the network computes what it did before.
    """
    flat = dict(nnx.to_flat_state(nnx.state(unet)))
    kernel = flat[_CONV_IN]
    flat[_CONV_IN] = kernel.replace(jnp.tile(kernel[...], (1, 1, inputs, 1)) / inputs)
    config = dataclasses.replace(unet.config, in_channels=inputs * unet.config.in_channels)
    dtypes = {"dtype": unet.dtype, "param_dtype": kernel.dtype}
    wide = shapes_of(lambda rngs: UNet2DConditionModel(config, **dtypes, rngs=rngs))
    return nnx.merge(nnx.graphdef(wide), nnx.from_flat_state(flat))


def whole_patches(valid_xHxW: jax.Array | np.ndarray, size: tuple[int, ...]) -> Any:
    """bool [..., h, w], of JAX or of NumPy as given: the patches of a grid of `size` all of whose pixels are valid.

    Each side of the grid must divide that of the mask.
    """
    (*batch, height, width), (h, w) = valid_xHxW.shape, size
    return valid_xHxW.reshape(*batch, h, height // h, w, width // w).all(axis=(-3, -1))


_CONV_IN = ("conv_in", "kernel")
