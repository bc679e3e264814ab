"""A PyTorch twin of FID's InceptionV3 on plain torch.nn, for machines without torchvision.

Written for these tests from the layers' widths and the places where TensorFlow's graph differs. That it is
torch-fidelity's network is a test of its own, which runs where torch-fidelity is installed.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, size, **options) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, bias=False, **options)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


def one(inputs: int, outputs: int) -> Conv:
    return Conv(inputs, outputs, 1)


def three(inputs: int, outputs: int) -> Conv:
    return Conv(inputs, outputs, 3, padding=1)


def five(inputs: int, outputs: int) -> Conv:
    return Conv(inputs, outputs, 5, padding=2)


def half(inputs: int, outputs: int) -> Conv:
    return Conv(inputs, outputs, 3, stride=2)


def row(inputs: int, outputs: int, size: int = 7) -> Conv:
    return Conv(inputs, outputs, (1, size), padding=(0, size // 2))


def column(inputs: int, outputs: int, size: int = 7) -> Conv:
    return Conv(inputs, outputs, (size, 1), padding=(size // 2, 0))


def mean_pool(x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False)


def halve(x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(x, 3, 2)


class A(nn.Module):
    def __init__(self, inputs: int, pool: int) -> None:
        super().__init__()
        self.branch1x1 = one(inputs, 64)
        self.branch5x5_1, self.branch5x5_2 = one(inputs, 48), five(48, 64)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = one(inputs, 64), three(64, 96)
        self.branch3x3dbl_3 = three(96, 96)
        self.branch_pool = one(inputs, pool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        five_by_five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five_by_five, double, self.branch_pool(mean_pool(x))], 1)


class B(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = half(inputs, 384)
        self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3 = one(inputs, 64), three(64, 96), half(96, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, halve(x)], 1)


class C(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branch1x1, self.branch_pool = one(inputs, 192), one(inputs, 192)
        self.branch7x7_1, self.branch7x7_2, self.branch7x7_3 = one(inputs, width), row(width, width), column(width, 192)
        self.branch7x7dbl_1, self.branch7x7dbl_2 = one(inputs, width), column(width, width)
        self.branch7x7dbl_3, self.branch7x7dbl_4 = row(width, width), column(width, width)
        self.branch7x7dbl_5 = row(width, 192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(mean_pool(x))], 1)


class D(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = one(inputs, 192), half(192, 320)
        self.branch7x7x3_1, self.branch7x7x3_2 = one(inputs, 192), row(192, 192)
        self.branch7x7x3_3, self.branch7x7x3_4 = column(192, 192), half(192, 192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        long = self.branch7x7x3_2(self.branch7x7x3_1(x))
        long = self.branch7x7x3_4(self.branch7x7x3_3(long))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), long, halve(x)], 1)


class E(nn.Module):
    def __init__(self, inputs: int, *, maximum: bool) -> None:
        super().__init__()
        self.maximum = maximum
        self.branch1x1, self.branch_pool = one(inputs, 320), one(inputs, 192)
        self.branch3x3_1 = one(inputs, 384)
        self.branch3x3_2a, self.branch3x3_2b = row(384, 384, 3), column(384, 384, 3)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = one(inputs, 448), three(448, 384)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = row(384, 384, 3), column(384, 384, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, 1, padding=1) if self.maximum else mean_pool(x)
        parts = [self.branch1x1(x), self.branch3x3_2a(single), self.branch3x3_2b(single)]
        parts += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(pooled)]
        return torch.cat(parts, 1)


class Inception(nn.Module):
    """`inception(uint8 [B, 3, H, W]) -> float32 [B, 2048]`"""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3, self.Conv2d_2b_3x3 = Conv(32, 32, 3), three(32, 64)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = one(64, 80), Conv(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = A(192, 32), A(256, 64), A(288, 64)
        self.Mixed_6a = B(288)
        self.Mixed_6b, self.Mixed_6c = C(768, 128), C(768, 160)
        self.Mixed_6d, self.Mixed_6e = C(768, 160), C(768, 192)
        self.Mixed_7a = D(768)
        self.Mixed_7b, self.Mixed_7c = E(1280, maximum=False), E(2048, maximum=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (resized(x.float(), 299) - 128) / 128
        x = halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = getattr(self, f"Mixed_{name}")(x)
        return x.mean((2, 3))


def resized(x: torch.Tensor, size: int) -> torch.Tensor:
    """TensorFlow 1's bilinear as two matrices of weights, one for each side; float64, to judge by."""

    def weights(length: int) -> torch.Tensor:
        matrix = np.zeros((size, length))
        for i in range(size):
            place = i * length / size
            low = int(place)
            matrix[i, low] += 1 - (place - low)
            matrix[i, min(low + 1, length - 1)] += place - low
        return torch.from_numpy(matrix)

    tall, wide = weights(x.shape[2]), weights(x.shape[3])
    return torch.einsum("yh,bchw,xw->bcyx", tall, x.double(), wide).float()


@torch.no_grad()
def random_inception(seed: int = 0) -> Inception:
    """Random weights that keep the signal's size through the depth, and batch norms that are far from the identity."""
    torch.manual_seed(seed)
    model = Inception()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.7, 1.3)
            module.bias.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.6, 1.4)
    return model.eval()
