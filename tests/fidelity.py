"""torch-fidelity, the PyTorch implementation of FID and KID that ours are held against.

It imports torchvision for networks that no test looks at. torchvision is left out: each of its builds fits one build of
PyTorch, and beside another it cannot be imported, nor can anything that looks for it.
"""

import importlib
import sys
import types
from unittest import mock

import torch
from torch import nn


def _imported(name: str) -> types.ModuleType:
    """A module of torch-fidelity, with empty modules in the place of torchvision's while it is imported."""
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    empty = {name: types.ModuleType(name) for name in names if name not in sys.modules}
    for parent, _, child in (name.rpartition(".") for name in empty if "." in name):
        setattr(empty[parent], child, empty[f"{parent}.{child}"])
    if "torchvision.datasets" in empty:
        vars(empty["torchvision.datasets"]).update(CIFAR10=object, CIFAR100=object, STL10=object)
    sys.modules.update(empty)
    try:
        return importlib.import_module(f"torch_fidelity.{name}")
    finally:
        for name in empty:
            del sys.modules[name]


inception = _imported("feature_extractor_inceptionv3")
interpolate = _imported("interpolate_compat_tensorflow")
fid, kid = _imported("metric_fid"), _imported("metric_kid")


@torch.no_grad()
def random_inception(seed: int = 0) -> nn.Module:
    """`inception(uint8 [B, 3, H, W]) -> (float32 [B, 2048],)` of random weights, of which none are downloaded.

    They keep the signal's size through the depth, and batch norms are far from the identity.
    """
    torch.manual_seed(seed)
    network = inception.FeatureExtractorInceptionV3
    with mock.patch.object(inception, "load_state_dict_from_url"), mock.patch.object(network, "load_state_dict"):
        model = network("inception-v3-compat", ["2048"])
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.7, 1.3)
            module.bias.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.6, 1.4)
    return model
