"""Which pixels of which data set count, and in what range: the protocols of depth benchmarks.

After Marigold's evaluation, https://github.com/prs-eth/Marigold at b1dffaa: `config/dataset_depth/*.yaml` (crops),
`src/dataset/*_dataset.py` (ranges, masks) and `script/depth/eval/*.sh` (the size of the fit).
"""

import dataclasses
from types import MappingProxyType

import numpy as np

from d2f_jax.data.depth import KITTI_SIZE, cut


@dataclasses.dataclass(frozen=True)
class Window:
    """Rows and columns [first, end): pixels of a picture of the size `of`, or, without it, shares of any picture."""

    rows: tuple[float, float]
    columns: tuple[float, float]
    of: tuple[int, int] | None = None

    def mask(self, height: int, width: int) -> np.ndarray:
        """bool [H, W]. Raises `ValueError` for a picture of another size than `of`."""
        if self.of is not None and self.of != (height, width):
            raise ValueError(f"this crop is of pictures of {self.of[0]} x {self.of[1]} pixels, not {height} x {width}")
        tall, wide = (1, 1) if self.of else (height, width)
        mask_HxW = np.zeros((height, width), bool)
        rows = slice(*(int(share * tall) for share in self.rows))
        mask_HxW[rows, slice(*(int(share * wide) for share in self.columns))] = True
        return mask_HxW


@dataclasses.dataclass(frozen=True)
class DepthProtocol:
    """A row of `DEPTH_PROTOCOLS`."""

    min_depth: float  # metres; a pixel counts where its depth lies between, and predictions are clipped to both
    max_depth: float
    cut_to: tuple[int, int] | None = None  # pixels; picture and depth alike, at the bottom, in the middle of the width
    window: Window | None = None
    own_mask: bool = False  # the data set says which pixels count, whatever their depth
    # Marigold fits ETH3D's 24 megapixels on columns thinned by the factor that brings the longer side to this many
    # pixels; its rows all stay, since its downsampling sees them as channels.
    fit_size: int | None = None

    def cut(self, x_HxWx: np.ndarray) -> np.ndarray:
        """Picture, depth or mask [H, W, ...] cut to `cut_to`. Raises `ValueError` for one that is smaller."""
        return x_HxWx if self.cut_to is None else cut(x_HxWx, self.cut_to)

    def valid(self, depth_HxW: np.ndarray, given_mask_HxW: np.ndarray | None = None) -> np.ndarray:
        """bool [H, W]: which pixels count, of a depth map after `cut`.

        Raises `ValueError` for one that is not cut, and where a mask is given or lacking against `own_mask`.
        """
        if self.cut_to not in (None, depth_HxW.shape):
            raise ValueError(f"the depth map must be cut to {self.cut_to}, not {depth_HxW.shape}; call cut() first")
        if self.own_mask != (given_mask_HxW is not None):
            raise ValueError(f"this data set has {'its own mask: give it' if self.own_mask else 'no mask of its own'}")
        if given_mask_HxW is not None:
            valid_HxW = np.asarray(given_mask_HxW, bool) & (depth_HxW > 0)
        else:
            valid_HxW = (depth_HxW > self.min_depth) & (depth_HxW < self.max_depth)
        return valid_HxW if self.window is None else valid_HxW & self.window.mask(*depth_HxW.shape)


_SIDES = (0.0359477, 0.96405229)
_KITTI = DepthProtocol(1e-5, 80.0, cut_to=KITTI_SIZE)
DEPTH_PROTOCOLS = MappingProxyType(
    {
        # whatever was measured
        "all": DepthProtocol(0.0, np.inf),
        # 654 test pictures, 480 x 640; Eigen et al. (2014)
        "nyuv2": DepthProtocol(1e-3, 10.0, window=Window((45, 471), (41, 601), of=(480, 640))),
        # Eigen's test split, 652 pictures with improved ground truth
        "kitti": dataclasses.replace(_KITTI, window=Window((0.3324324, 0.91351351), _SIDES)),
        # the same with the crop of Garg et al. (2016)
        "kitti_garg": dataclasses.replace(_KITTI, window=Window((0.40810811, 0.99189189), (0.03594771, 0.96405229))),
        # float32 files of 4032 x 6048, infinite where nothing was measured
        "eth3d": DepthProtocol(1e-5, np.inf, fit_size=1024),
        # 800 pictures of the validation set
        "scannet": DepthProtocol(1e-3, 10.0),
        # validation set, indoors and outdoors
        "diode": DepthProtocol(0.6, 350.0, own_mask=True),
    }
)
