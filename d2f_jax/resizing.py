"""Pictures and depth maps at the resolution that a network works at, and back."""

import numpy as np
from PIL import Image


def working_size(height: int, width: int, resolution: int, factor: int) -> tuple[int, int]:
    """Height and width, multiples of `factor`, of a picture whose longer side is to have `resolution` pixels."""
    scale = resolution / max(height, width)
    return tuple(max(1, round(side * scale / factor)) * factor for side in (height, width))  # pyright: ignore[reportReturnType]


def resized(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [B, H, W, 3] or float32 [B, H, W] at another size, antialiased."""
    if images.shape[1:3] == (height, width):
        return images
    how = Image.Resampling.BILINEAR
    return np.stack([np.asarray(Image.fromarray(image).resize((width, height), how)) for image in images])
