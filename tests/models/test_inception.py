"""FID's InceptionV3 against torch-fidelity's at random weights, batch norm's statistics included."""

from pathlib import Path

import fidelity
import numpy as np
import pytest
import safetensors.torch
import torch
import twins

from d2f_jax import InputError
from d2f_jax.metrics import inception_features, load_inception
from d2f_jax.models import inception


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    return fidelity.random_inception()


@pytest.fixture(scope="module")
def file(theirs: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made as the docstring says."""
    folder = tmp_path_factory.mktemp("inception")
    torch.save(theirs.state_dict(), folder / "pt.pth")
    tensors = torch.load(folder / "pt.pth", map_location="cpu", weights_only=True)
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "inception.safetensors")
    return folder / "inception.safetensors"


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Smooth and rough, so that a resize that differs is seen; neither side divides 299."""
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 200, 70)[None, :, None, None] + np.linspace(0, 50, 90)[None, None, :, None]
    return (smooth + rng.integers(0, 6, (2, 70, 90, 3))).astype(np.uint8)


def test_features_are_torch_fidelity_s(theirs: torch.nn.Module, file: Path, pictures: np.ndarray) -> None:
    expected = theirs(twins.nchw(pictures))[0].numpy()
    ours = inception_features(load_inception(file), pictures, batch_size=2)
    assert ours.shape == (2, inception.NUM_FEATURES) and ours.dtype == np.float32
    twins.assert_close(ours, expected, 1e-5)
    # The two pictures, which differ in a few levels, are told apart far more clearly than that.
    assert np.abs(expected[0] - expected[1]).max() > 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("size", [31, 299, 640])
def test_resize_is_tensorflow_1_s(size: int) -> None:
    x = np.random.default_rng(size).uniform(0, 255, (1, size, size + 7, 3)).astype(np.float32)
    expected = fidelity.interpolate.interpolate_bilinear_2d_like_tensorflow1x(
        twins.nchw(x), size=(299, 299), align_corners=False
    )
    np.testing.assert_allclose(inception.resize(x, 299), twins.nhwc(expected), atol=1e-3)
    if size == 299:
        np.testing.assert_array_equal(inception.resize(x[:, :, :299], 299), x[:, :, :299])


def test_pictures_are_bytes() -> None:
    with pytest.raises(ValueError, match="must be uint8, not float32"):
        inception_features(None, np.zeros((2, 8, 8, 3), np.float32))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"must be \[N, H, W, 3\] with N > 0, not \[0, 8, 8, 3\]"):
        inception_features(None, np.zeros((0, 8, 8, 3), np.uint8))  # pyright: ignore[reportArgumentType]


def test_without_weights_there_is_no_number(file: Path, tmp_path: Path) -> None:
    recipe = r"pt_inception-2015-12-05-6726825d\.pth.*load_inception"
    with pytest.raises(InputError, match=f"no file is given; .*{recipe}"):
        load_inception(None)
    with pytest.raises(InputError, match=rf"not at .*nothing\.safetensors; .*{recipe}"):
        load_inception(tmp_path / "nothing.safetensors")
    with pytest.raises(InputError, match=rf"pt\.pth is no \.safetensors file; .*{recipe}"):
        load_inception(file.with_name("pt.pth"))
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"cut\.safetensors is damaged"):
        load_inception(tmp_path / "cut.safetensors")


def test_another_network_s_tensors_are_named_together(file: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(file)
    tensors["AuxLogits.fc.weight"] = tensors.pop("Mixed_7c.branch_pool.bn.running_var")
    tensors["fc.weight"], tensors["fc.bias"] = torch.zeros(1000, 2048), torch.zeros(1000)
    safetensors.torch.save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(InputError) as error:
        load_inception(tmp_path / "other.safetensors")
    for fault in (
        "missing Mixed_7c.branch_pool.bn.running_var",
        "unexpected AuxLogits.fc.weight",
        "misshapen fc.bias (1000,), should be (1008,)",
        "misshapen fc.weight (1000, 2048), should be (1008, 2048)",
    ):
        assert fault in str(error.value)
