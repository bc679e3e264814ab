"""PyTorch twins: networks made and written by diffusers and transformers, with random weights everywhere."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

SD15_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD21_UNET: dict[str, Any] = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
    "upcast_attention": True,
}
SD_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
CLIP_L: dict[str, Any] = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
OPEN_CLIP_H: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 23,
    "hidden_act": "gelu",
}
SMALL_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
SMALL_VAE: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
SMALL_TAESD: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (12, 12),
    "num_encoder_blocks": (1, 2),
    "num_decoder_blocks": (2, 1),
}
SMALL_CLIP: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "max_position_embeddings": 12,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def unet(**config: Any) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(0)
    return shaken(diffusers.UNet2DConditionModel(**config))


def vae(**config: Any) -> diffusers.AutoencoderKL:
    torch.manual_seed(1)
    return shaken(diffusers.AutoencoderKL(**config))


def taesd(**config: Any) -> diffusers.AutoencoderTiny:
    torch.manual_seed(3)
    return shaken(diffusers.AutoencoderTiny(**config))


def text_encoder(**config: Any) -> transformers.CLIPTextModel:
    torch.manual_seed(2)
    return shaken(transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)))


class Aesthetic(torch.nn.Module):
    """LAION's improved predictor, of random weights, for embeddings of so many numbers; without its training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(4)
        drop, linear = torch.nn.Dropout, torch.nn.Linear
        first = linear(width, 1024), drop(0.2), linear(1024, 128), drop(0.2)
        self.layers = torch.nn.Sequential(*first, linear(128, 64), drop(0.1), linear(64, 16), linear(16, 1))
        for layer in (layer for layer in self.layers if isinstance(layer, linear)):
            torch.nn.init.normal_(layer.weight, 0, 2 / layer.in_features**0.5)  # pictures that are alike stay apart
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@torch.no_grad()
def shaken(model: Any) -> Any:
    """Norms and biases start at ones and zeros, where an exchange of two would go unseen: moved a little."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def written(model: Any, folder: Path, **options: Any) -> Path:
    """The folder, with the model in it as its own library saves it."""
    model.save_pretrained(folder, **options)
    return folder


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.detach().numpy().transpose(0, 2, 3, 1)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(ours: Any, theirs: np.ndarray, tolerance: float = 1e-4) -> None:
    """Largest error against the largest value."""
    assert ours.shape == theirs.shape
    error, scale = np.abs(np.asarray(ours) - theirs).max(), np.abs(theirs).max()
    assert scale > 1e-3, "an output of zeros proves nothing"
    assert error <= tolerance * scale, f"off by {error / scale:.1e} of the largest value"
