"""Low-rank adaptation as a pure function of parameters, and beside the activations where it has to be."""

import dataclasses
import functools
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import twins
from flax import nnx

from configs import quickstart
from d2f_jax import lora, optim, prior, settings
from d2f_jax import step as steps
from d2f_jax.errors import InputError
from d2f_jax.lora import Adapter, Conditional, Targets
from d2f_jax.models.layers import shapes_of
from d2f_jax.models.unet import UNet2DConditionModel, UNetConfig

EVERYTHING = Targets(
    self_attention_rank=2,
    cross_attention_ratio=0.1,
    attention_out=True,
    conv_rank=3,
    mlp_rank=2,
    first_layer=True,
    last_layer=True,
)
ATTENTION = Targets(self_attention_rank=3, cross_attention_rank=3)


WAYS = (("down", 2), ("up", 0))


@functools.cache
def network(linear: bool = False) -> UNet2DConditionModel:
    """Two levels: with strided convolutions, shortcuts and attention of both kinds."""
    blocks = {"block_out_channels": (16, 32), "attention_head_dim": 4, "use_linear_projection": linear}
    blocks |= {f"{way}_block_types": getattr(UNetConfig, f"{way}_block_types")[i : i + 2] for way, i in WAYS}
    config = UNetConfig(**twins.SMALL_UNET | blocks)
    return UNet2DConditionModel(config, rngs=nnx.Rngs(0))


@functools.cache
def abstract(version: str) -> nnx.State:
    config = UNetConfig(**{"1.5": twins.SD15_UNET, "2.1": twins.SD21_UNET}[version])
    return nnx.state(shapes_of(lambda rngs: UNet2DConditionModel(config, rngs=rngs)))


@functools.cache
def shapes(version: str, targets: Targets) -> dict[str, Any]:
    """What would be trained at full size, without an array."""
    return jax.eval_shape(lambda params: lora.init(params, jax.random.key(0), targets), abstract(version))


def count(trained: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(trained))


def stirred(trained: Any, seed: int = 0) -> Any:
    """As after training: nothing is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), trained)


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    return (
        jnp.asarray(twins.random(2, 8, 8, 4)),
        jnp.asarray([3.0, 700.0]),
        jnp.asarray(twins.random(2, 5, 24, seed=1)),
    )


def params_of(unet: nnx.Module) -> nnx.State:
    return nnx.state(unet)


# Which layers


@pytest.mark.parametrize(
    ("preset", "millions", "parameters"),
    [("lora_small", "61.5", 61_513_156), ("lora_base", "207.5", 207_459_652)],
)
def test_the_presets_train_what_the_papers_do_on_stable_diffusion_2(
    preset: str, millions: str, parameters: int
) -> None:
    trained = shapes("2.1", prior.lora_targets(quickstart.get_config(preset), 4))
    assert count(trained) == parameters and f"{parameters / 1e6:.1f}" == millions
    full = {path for path, entry in trained.items() if not isinstance(entry, Adapter)}
    leaves = ("conv_in.kernel", "conv_in.bias", "conv_out.kernel", "conv_out.bias")
    assert full == {*leaves, "conv_norm_out.scale", "conv_norm_out.bias"}


@pytest.mark.parametrize("preset", ["lora_small", "lora_base"])
@pytest.mark.parametrize("name", get_args(optim.Name))
def test_the_optimizer_and_the_average_hold_what_is_trained_and_no_more(preset: str, name: optim.Name) -> None:
    """Of Stable Diffusion 2.1: nothing has the size of the base."""
    config = quickstart.get_config(preset)
    config.train.optimizer = name
    trained = shapes("2.1", prior.lora_targets(config, 4))
    optimizer = optim.make_optimizer(settings.make_optimizer_options(config))
    init = functools.partial(steps.init_state, optimizer=optimizer, root_key=jax.random.key(0))
    state = jax.eval_shape(init, trained)
    assert state.trained == state.ema == trained
    held, each = jax.tree.leaves(state.opt_state), jax.tree.leaves(trained)
    if name == "adafactor":  # rows and columns of large matrices; of others a number for each of theirs, and two more
        assert count(held) < count(each) + 3 * len(each)
    else:
        moments = sorted(x.shape for x in held if x.shape)
        assert moments == sorted([x.shape for x in each] * 2)


def test_quickstart_presets_differ_in_nothing_but_lora_and_the_rate() -> None:
    plain = quickstart.get_config().to_dict()
    for preset in quickstart.LORA:
        config = quickstart.get_config(preset).to_dict()
        assert config["lora"]["enabled"] and not plain["lora"]["enabled"]
        config["lora"], config["train"]["learning_rate"] = plain["lora"], plain["train"]["learning_rate"]
        assert config == plain


@pytest.mark.parametrize(
    ("targets", "patterns"),
    [
        ({"self_attention_rank": 1}, {"attn1.to_q", "attn1.to_k", "attn1.to_v"}),
        ({"cross_attention_rank": 1}, {"attn2.to_q", "attn2.to_k", "attn2.to_v"}),
        (
            {"cross_attention_ratio": 0.1, "attention_out": True},
            {"attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"},
        ),
        ({"mlp_rank": 1}, {"proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"}),
        ({"conv_rank": 1}, {"conv1", "conv2", "conv_shortcut", "conv"}),
    ],
)
def test_a_group_is_these_layers_and_no_others(targets: dict[str, Any], patterns: set[str]) -> None:
    paths = {
        path.removesuffix(".kernel") for path in shapes("2.1", Targets(**targets)) if path.startswith("down_blocks.1")
    }
    found = {next((p for p in patterns if path.endswith(f".{p}")), path) for path in paths}
    assert found == patterns


def test_projections_are_convolutions_in_stable_diffusion_1() -> None:
    name = "down_blocks.0.attentions.0.proj_in.kernel"
    by_conv, by_mlp = shapes("1.5", Targets(conv_rank=4)), shapes("1.5", Targets(mlp_rank=8))
    assert by_conv[name].a.shape == (1, 1, 320, 4) and by_mlp[name].a.shape == (1, 1, 320, 8)
    both = shapes("1.5", Targets(conv_rank=4, mlp_rank=8))
    assert both[name].a.shape[-1] == 4 and both[
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2.kernel"
    ].b.shape == (
        8,
        1280,
    )
    assert name not in shapes("2.1", Targets(conv_rank=4))


@pytest.mark.parametrize("ratio", [0.001, 0.2, 1.0])
def test_a_ratio_is_of_the_longer_side_and_no_rank_exceeds_its_kernels(ratio: float) -> None:
    targets = Targets(self_attention_ratio=ratio, cross_attention_ratio=ratio, conv_ratio=ratio, mlp_ratio=ratio)
    params = params_of(network())
    flat = lora.flatten(params)
    for path, adapter in jax.eval_shape(lambda p: lora.init(p, jax.random.key(0), targets), params).items():
        *kernel, fan_in, outputs = flat[path].shape
        rank = min(int(np.ceil(ratio * max(fan_in, outputs))), fan_in * int(np.prod(kernel)), outputs)
        assert adapter.a.shape == (*kernel, fan_in, rank) and adapter.b.shape == (rank, outputs)


def test_first_and_last_layer_are_adapted_or_trained_fully_never_both() -> None:
    adapted = shapes("2.1", Targets(conv_rank=64))
    assert adapted["conv_in.kernel"].b.shape == (36, 320) and adapted["conv_out.kernel"].b.shape == (4, 4)
    full = shapes("2.1", Targets(conv_rank=64, first_layer=True, last_layer=True))
    assert full["conv_in.kernel"].shape == (3, 3, 4, 320) and full["conv_out.bias"].shape == (4,)
    assert full.keys() - adapted.keys() == {
        "conv_in.bias",
        "conv_out.bias",
        "conv_norm_out.scale",
        "conv_norm_out.bias",
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "trains nothing"),
        ({"conv_rank": 999}, "conv_rank=999 is more than 32"),
        ({"attention_out": True, "mlp_rank": 1}, "attention_out adapts nothing"),
        ({"condition_channels": 3, "mlp_rank": 1}, "condition_channels conditions nothing"),
    ],
)
def test_a_knob_that_does_nothing_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        lora.init(params_of(network()), jax.random.key(0), Targets(**changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "knob", ["self_attention_rank", "cross_attention_rank", "conv_ratio", "mlp_rank", "first_layer", "last_layer"]
)
def test_a_knob_that_matches_no_layer_is_named(knob: str) -> None:
    linear = nnx.state(nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match=f"lora {knob.removesuffix('_rank').removesuffix('_ratio')} matches no layer"):
        lora.init(linear, jax.random.key(0), Targets(**{knob: 1}))


# What they do


@pytest.mark.parametrize("linear", [False, True], ids=["SD 1.x", "SD 2.x"])
def test_new_adapters_are_the_identity_bit_for_bit(linear: bool) -> None:
    params = params_of(network(linear))
    merged = lora.merge(params, lora.init(params, jax.random.key(0), EVERYTHING), scale=4.0)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for before, after in zip(jax.tree.leaves(params), jax.tree.leaves(merged), strict=True):
        assert np.asarray(before).tobytes() == np.asarray(after).tobytes()


@pytest.mark.parametrize("linear", [False, True], ids=["SD 1.x", "SD 2.x"])
def test_merged_weights_are_the_low_rank_activations(linear: bool) -> None:
    unet = network(linear)
    graphdef, params = nnx.split(unet)
    trained = stirred(
        lora.init(params, jax.random.key(0), dataclasses.replace(EVERYTHING, first_layer=False, last_layer=False))
    )
    beside = nnx.merge(graphdef, params)
    lora.attach(beside, trained, scale=0.5)
    expected = jax.jit(lambda: beside(*inputs()))()
    run = jax.jit(lambda params: nnx.merge(graphdef, params)(*inputs()))
    merged = run(lora.merge(params, trained, scale=0.5))
    assert not np.allclose(merged, run(params), atol=0.1)
    twins.assert_close(merged, np.asarray(expected), tolerance=1e-5)


def test_what_is_trained_fully_replaces_the_base_and_bears_no_scale() -> None:
    params = params_of(network())
    trained = stirred(lora.init(params, jax.random.key(0), Targets(conv_rank=1, first_layer=True, last_layer=True)))
    merged = lora.flatten(lora.merge(params, trained, scale=0.25))
    for path in ("conv_in.kernel", "conv_in.bias", "conv_norm_out.scale", "conv_out.kernel", "conv_out.bias"):
        np.testing.assert_array_equal(merged[path], trained[path])


def test_what_is_trained_fully_is_a_copy_that_can_be_donated() -> None:
    params = params_of(network())
    trained = lora.init(params, jax.random.key(0), Targets(conv_rank=1, first_layer=True))
    jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(trained)
    assert all(x.is_deleted() for x in jax.tree.leaves(trained))
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))


def test_gradients_reach_the_zero_factor_first() -> None:
    params = params_of(network())

    def loss(trained: Any) -> jax.Array:
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(lora.merge(params, trained, scale=1.0)))

    for entry in jax.jit(jax.grad(loss))(lora.init(params, jax.random.key(0), EVERYTHING)).values():
        assert not isinstance(entry, Adapter) or (not np.any(entry.a) and np.any(entry.b))


def test_new_factors_are_drawn_as_published() -> None:
    trained = lora.init(params_of(network()), jax.random.key(0), Targets(self_attention_rank=16, conv_rank=32))
    conv = trained["up_blocks.0.resnets.0.conv1.kernel"].a  # torch's kaiming_normal_(a=1): 1 / sqrt(fan in)
    assert np.std(conv) == pytest.approx((9 * conv.shape[2]) ** -0.5, rel=0.02)
    linear = trained["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.kernel"].a  # torch.nn.Linear's own
    assert np.abs(linear).max() == pytest.approx(16**-0.5, rel=0.02)


# Conditional


CONDITIONAL = Targets(conv_rank=3, condition_channels=5)


def conditional(seed: int = 0) -> dict[str, Conditional]:
    trained = lora.init(params_of(network()), jax.random.key(0), CONDITIONAL)
    assert all(isinstance(entry, Conditional) for entry in trained.values())
    return stirred(trained, seed)


def with_condition(
    adapters: dict[str, Any], condition: jax.Array, *, remat: str = "none", scale: float = 0.5
) -> jax.Array:
    @jax.jit
    def run(adapters: dict[str, Any], condition: jax.Array) -> jax.Array:
        unet = nnx.merge(*nnx.split(network()))
        unet.set_remat(remat)
        lora.attach(unet, adapters, scale=scale, condition=condition)
        return unet(*inputs())

    return run(adapters, condition)


def test_a_constant_condition_makes_a_plain_adapter_with_a_scaled_and_a_bias() -> None:
    adapters, c = conditional(), jnp.asarray(twins.random(5, seed=4))
    params, scale = params_of(network()), 0.5
    plain = {path: Adapter(e.a * (1 + c @ e.gamma), e.b) for path, e in adapters.items()}
    flat = lora.flatten(params)
    biases = {
        path.replace(".kernel", ".bias"): flat[path.replace(".kernel", ".bias")] + scale * (c @ e.beta) @ e.b
        for path, e in adapters.items()
    }
    merged = lora.merge(params, plain | biases, scale=scale)
    expected = jax.jit(lambda: nnx.merge(nnx.graphdef(network()), merged)(*inputs()))()
    everywhere = jnp.broadcast_to(c, (2, 8, 8, 5))
    twins.assert_close(with_condition(adapters, everywhere), np.asarray(expected), tolerance=1e-5)
    assert not np.allclose(with_condition(adapters, 2 * everywhere), expected, atol=0.01)


def test_recomputing_blocks_sees_the_condition_too() -> None:
    adapters, condition = conditional(), jnp.asarray(twins.random(2, 8, 8, 5, seed=4))
    expected = with_condition(adapters, condition)
    twins.assert_close(with_condition(adapters, condition, remat="blocks"), np.asarray(expected), tolerance=1e-5)
    gradient = jax.grad(lambda a: jnp.sum(with_condition(a, condition, remat="blocks") ** 2))(adapters)
    assert all(np.any(x) for x in jax.tree.leaves(gradient))


class TorchConditional(torch.nn.Module):
    """A convolution with a LoRAdapter, as the paper has it; there the condition comes in the size of each level."""

    def __init__(self, base: torch.nn.Conv2d, rank: int, channels: int) -> None:
        super().__init__()
        self.base = base
        options = {"kernel_size": base.kernel_size, "stride": base.stride, "padding": base.padding}
        self.a = torch.nn.Conv2d(base.in_channels, rank, bias=False, **options)
        self.b = torch.nn.Conv2d(rank, base.out_channels, 1, bias=False)
        self.gamma, self.beta = (torch.nn.Conv2d(channels, rank, 1, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor, c: torch.Tensor, scale: float) -> torch.Tensor:
        z = self.a(x)
        c = torch.nn.functional.interpolate(c, z.shape[2:], mode="bilinear", antialias=True)
        z = z * (1 + self.gamma(c)) + self.beta(c)
        return self.base(x) + scale * self.b(z)


class Convolution(nnx.Module):
    def __init__(self, inputs: int = 6, outputs: int = 7, size: int = 3, stride: int = 1) -> None:
        self.conv = nnx.Conv(inputs, outputs, (size, size), strides=stride, padding=size // 2, rngs=nnx.Rngs(0))


@torch.no_grad()
@pytest.mark.parametrize(
    ("inputs", "outputs", "rank", "side", "size", "stride", "condition"),
    [
        (6, 7, 4, 8, 3, 1, 8),
        (6, 7, 4, 8, 3, 2, 4),
        (6, 7, 4, 8, 1, 1, 8),
        (6, 7, 4, 8, 3, 1, 3),  # a condition that grows
        (6, 7, 4, 8, 3, 2, 10),  # and ones that shrink, by 2.5 and by 2
        (320, 320, 64, 64, 3, 1, 64),  # Stable Diffusion's, at 512 pixels and the paper's ranks
        (320, 320, 64, 64, 3, 2, 64),
        (640, 1280, 256, 16, 3, 1, 64),
        (2560, 1280, 64, 8, 1, 1, 64),
    ],
)
def test_a_conditional_convolution_equals_pytorch(
    inputs: int, outputs: int, rank: int, side: int, size: int, stride: int, condition: int
) -> None:
    """The condition is a picture's latent, brought to the size of what it scales and shifts."""
    torch.manual_seed(0)
    base = torch.nn.Conv2d(inputs, outputs, size, stride, size // 2)
    theirs, ours = TorchConditional(base, rank, 4), Convolution(inputs, outputs, size, stride)

    def kernel(module: torch.nn.Module) -> np.ndarray:
        return module.weight.detach().numpy().transpose(2, 3, 1, 0)

    ours.conv.kernel[...], ours.conv.bias[...] = kernel(theirs.base), theirs.base.bias.detach().numpy()
    maps = [kernel(m)[0, 0] for m in (theirs.b, theirs.gamma, theirs.beta)]
    adapters = {"conv.kernel": Conditional(*map(jnp.asarray, (kernel(theirs.a), *maps)))}
    x, c = twins.random(2, side, side, inputs), twins.random(2, condition, condition, 4, seed=1)
    lora.attach(ours, adapters, scale=0.7, condition=jnp.asarray(c))
    expected = theirs(twins.nchw(x), twins.nchw(c), 0.7)
    found = ours.conv(jnp.asarray(x))
    twins.assert_close(found, twins.nhwc(expected), tolerance=1e-5)
    assert np.abs(found - twins.nhwc(base(twins.nchw(x)))).max() > 0.1 * np.abs(found).max()


def test_a_new_conditional_adapter_is_the_identity_bit_for_bit() -> None:
    plain, adapted = Convolution(), Convolution()
    new = lora.init(nnx.state(plain), jax.random.key(0), CONDITIONAL)
    lora.attach(adapted, new, scale=4.0, condition=jnp.asarray(twins.random(2, 4, 4, 5)))
    x = jnp.asarray(twins.random(2, 8, 8, 6))
    np.testing.assert_array_equal(plain.conv(x), adapted.conv(x))
    assert np.any(new["conv.kernel"].gamma) and np.any(new["conv.kernel"].beta)
    with pytest.raises(ValueError, match="2 pictures condition adapters of 4 rows; give one for each"):
        adapted.conv(jnp.concatenate([x, x]))


def test_a_condition_that_is_missing_is_asked_for_and_none_is_merged() -> None:
    with pytest.raises(InputError, match="depends on a condition, and there is none"):
        lora.attach(nnx.merge(*nnx.split(network())), conditional(), scale=1.0)
    with pytest.raises(InputError, match="cannot be merged; attach it"):
        lora.merge(params_of(network()), conditional(), scale=1.0)
