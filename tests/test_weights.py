"""Checkpoints: what diffusers writes we load, what we write diffusers loads, and all that is wrong is said at once."""

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
import twins
from flax import nnx

from d2f_jax import InputError, load_text_encoder, load_unet, load_vae, weights

KINDS: dict[str, tuple[Any, Any, Any, str]] = {
    "unet": (
        lambda: twins.unet(**twins.SMALL_UNET),
        load_unet,
        diffusers.UNet2DConditionModel,
        "diffusion_pytorch_model",
    ),
    "vae": (lambda: twins.vae(**twins.SMALL_VAE), load_vae, diffusers.AutoencoderKL, "diffusion_pytorch_model"),
    "taesd": (
        lambda: twins.taesd(**twins.SMALL_TAESD),
        load_vae,
        diffusers.AutoencoderTiny,
        "diffusion_pytorch_model",
    ),
    "text_encoder": (
        lambda: twins.text_encoder(**twins.SMALL_CLIP),
        load_text_encoder,
        transformers.CLIPTextModel,
        "model",
    ),
}


@pytest.fixture(params=KINDS.values(), ids=KINDS.keys())
def kind(request: pytest.FixtureRequest) -> tuple[Any, Any, Any, str]:
    return request.param


def unprefixed(tensors: dict[str, Any]) -> dict[str, Any]:
    """Without the text tower's prefix, which transformers writes or not according to its version."""
    return {name.removeprefix("text_model."): value for name, value in tensors.items()}


def assert_same_tensors(ours: dict[str, np.ndarray], theirs: dict[str, torch.Tensor]) -> None:
    ours, theirs = unprefixed(ours), unprefixed(theirs)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name].view(np.uint8), tensor.contiguous().view(torch.uint8).numpy())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_trip_is_bit_for_bit(tmp_path: Path, kind: tuple, dtype: str) -> None:
    make, load, their_class, stem = kind
    theirs = make().to(getattr(torch, dtype))
    model = load(twins.written(theirs, tmp_path / "theirs"), param_dtype=dtype)
    weights.save_pretrained(model, tmp_path / "ours")
    tensors = {name: tensor for name, tensor in theirs.state_dict().items() if not name.endswith("position_ids")}
    written = tmp_path / "ours" / f"{stem}.safetensors"
    assert_same_tensors(safetensors.numpy.load_file(written), tensors)
    assert not list((tmp_path / "ours").glob("*.part"))

    # Their library, on what we wrote: the same network to the last bit.
    again = their_class.from_pretrained(tmp_path / "ours", torch_dtype=getattr(torch, dtype))
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    before, after = ({**(c if isinstance(c := m.config, dict) else c.to_dict())} for m in (theirs, again))
    for key in before.keys() - {"dtype", "torch_dtype"}:
        if not key.startswith("_"):
            assert json.dumps(after[key]) == json.dumps(before[key]), key

    # And ours again.
    reloaded = load(tmp_path / "ours", param_dtype=dtype)
    assert reloaded.config == model.config
    for (path, one), (_, two) in zip(
        nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(reloaded)), strict=True
    ):
        np.testing.assert_array_equal(one[...], two[...], err_msg=str(path))


def test_half_precision_files_become_float32_parameters(tmp_path: Path, kind: tuple) -> None:
    make, load, _, stem = kind
    theirs = make().half()
    folder = twins.written(theirs, tmp_path, variant="fp16")
    assert (folder / f"{stem}.fp16.safetensors").exists()
    weights.save_pretrained(load(folder, variant="fp16"), tmp_path / "ours")
    tensors = safetensors.numpy.load_file(tmp_path / "ours" / f"{stem}.safetensors")
    assert {t.dtype for t in tensors.values()} == {np.dtype(np.float32)}
    assert_same_tensors({k: v.astype(np.float16) for k, v in tensors.items()}, theirs.state_dict())
    with pytest.raises(InputError, match=rf"{stem}\.safetensors is missing .*{stem}\.fp16\.safetensors"):
        load(folder)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards(tmp_path: Path, kind: tuple, variant: str | None) -> None:
    make, load, _, stem = kind
    theirs = make()
    folder = twins.written(theirs, tmp_path, max_shard_size="20KB", variant=variant)
    shards = list(folder.glob(f"{stem}*.safetensors"))
    assert len(shards) > 1
    weights.save_pretrained(load(folder, variant=variant), tmp_path / "ours")
    tensors = safetensors.numpy.load_file(tmp_path / "ours" / f"{stem}.safetensors")
    assert_same_tensors(tensors, theirs.state_dict())
    shards[0].unlink()
    with pytest.raises(InputError, match=f"{shards[0].name} is missing"):
        load(folder, variant=variant)


def test_a_component_is_found_alone_and_in_its_pipeline(tmp_path: Path) -> None:
    twins.written(twins.vae(**twins.SMALL_VAE), tmp_path / "pipeline" / "vae")
    for place in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae", str(tmp_path / "pipeline")):
        assert load_vae(place).config.block_out_channels == (8, 16)
    with pytest.raises(InputError, match="holds no unet/"):
        load_unet(tmp_path / "pipeline")


def test_the_attention_names_of_old_autoencoders(tmp_path: Path) -> None:
    folder = twins.written(twins.vae(**twins.SMALL_VAE), tmp_path)
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for name, tensor in tensors.items():
        for new, former in names.items():
            name = name.replace(new, former)
        old[name] = tensor
    assert old.keys() != tensors.keys()
    safetensors.numpy.save_file(old, file)
    weights.save_pretrained(load_vae(folder), tmp_path / "ours")
    again = safetensors.numpy.load_file(tmp_path / "ours" / "diffusion_pytorch_model.safetensors")
    assert again.keys() == tensors.keys()


def test_everything_that_does_not_fit_is_in_one_error(tmp_path: Path) -> None:
    folder = twins.written(twins.unet(**twins.SMALL_UNET), tmp_path)
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors["conv_in.bias"]
    tensors["adapter.weight"] = np.zeros(3, np.float32)
    tensors["conv_out.weight"] = np.zeros((4, 16, 1, 1), np.float32)
    safetensors.numpy.save_file(tensors, file)
    with pytest.raises(InputError) as error:
        load_unet(folder)
    for part in ("missing conv_in.bias", "unexpected adapter.weight", "misshapen conv_out.weight (4, 16, 1, 1)"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_position_numbers_are_no_parameter(tmp_path: Path) -> None:
    folder = twins.written(twins.text_encoder(**twins.SMALL_CLIP), tmp_path)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    ids = {"text_model.embeddings.position_ids": np.arange(12)[None]}
    safetensors.numpy.save_file(tensors | ids, folder / "model.safetensors")
    assert sum(p.size for p in jax.tree.leaves(nnx.state(load_text_encoder(folder)))) == sum(
        t.size for t in tensors.values()
    )


@pytest.mark.parametrize("kept", [0, 100, -1000])
def test_truncated_weights(tmp_path: Path, kept: int) -> None:
    folder = twins.written(twins.vae(**twins.SMALL_VAE), tmp_path)
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.safetensors is damaged") as error:
        load_vae(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"), [("{", "is not JSON"), ("[]", "not a JSON object"), (None, "cannot be read")]
)
def test_damaged_config(tmp_path: Path, content: str | None, said: str) -> None:
    folder = twins.written(twins.vae(**twins.SMALL_VAE), tmp_path / "vae")
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=said):
        load_vae(tmp_path)


def test_neither_folder_nor_hub_id() -> None:
    with pytest.raises(InputError, match="model no/where/at/all: there is no such folder, and it is no hub id"):
        load_unet("no/where/at/all")


@pytest.mark.parametrize("there", [True, False])
def test_a_single_file_is_no_folder(there: bool, tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    if there:
        file.touch()
    said = "is one file" if there else "is not there, and would be one file"
    with pytest.raises(InputError, match=rf"model\.ckpt {said}; .*from_single_file\(\S+\)\.save_pretrained"):
        load_unet(file)


def test_only_what_is_needed_comes_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twins.written(twins.vae(**twins.SMALL_VAE), tmp_path / "vae", variant="fp16")
    names = [
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "v1-5-pruned.ckpt",
    ]
    asked = {}

    def snapshot_download(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(hub_id=hub_id, revision=revision)
        asked["files"] = [n for n in names if any(fnmatch.fnmatch(n, p) for p in allow_patterns)]
        return str(tmp_path)

    monkeypatch.setattr(weights, "snapshot_download", snapshot_download)
    load_vae("owner/name", variant="fp16", revision="main")
    assert asked == {"hub_id": "owner/name", "revision": "main", "files": [names[0], names[3]]}


def test_a_component_has_a_repository_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"
    twins.written(twins.vae(**twins.SMALL_VAE), hub)
    local = tmp_path / "local"
    local.mkdir()

    def snapshot_download(hub_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        for file in hub.iterdir():
            if any(fnmatch.fnmatch(file.name, p) for p in allow_patterns):
                shutil.copy(file, local)
        return str(local)

    monkeypatch.setattr(weights, "snapshot_download", snapshot_download)
    assert load_vae("owner/name").config == load_vae(hub).config


def test_the_embedded_model_has_its_name() -> None:
    assert load_vae("tiny-sd").config.latent_channels == 4
    assert weights.load_scheduler_config("tiny-sd")["prediction_type"] == "v_prediction"
