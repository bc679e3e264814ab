"""The train step: pure, the same on any mesh and in any number of parts, and training no more than it should."""

import dataclasses
from typing import Any, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
import twins
from flax import nnx
from schedules import SD, config

from d2f_jax import NoiseSchedule, alignment, flow, lora, objectives, optim, sharding
from d2f_jax import step as steps
from d2f_jax.alignment import Alignment
from d2f_jax.models.clip import CLIPTextConfig, CLIPTextModel
from d2f_jax.models.unet import UNet2DConditionModel, UNetConfig
from d2f_jax.models.vae import AutoencoderKL, VAEConfig
from d2f_jax.objectives import Objective
from d2f_jax.task import TEXT_TO_IMAGE

ADAM = optim.OptimizerOptions(
    name="adamw",
    learning_rate=2e-3,
    schedule="constant",
    warmup_steps=0,
    num_steps=100,
    final_rate=0.0,
    b1=0.9,
    b2=0.999,
    weight_decay=0.0,
    max_grad_norm=1.0,
    first_moment_dtype="float32",
)
OPTIMIZER = optim.make_optimizer(ADAM)
OPTIONS = steps.StepOptions(
    latent_scale=0.5,
    lora_scale=1.0,
    objective=Objective(),
    task=TEXT_TO_IMAGE,
    compute_dtype="float32",
    ema_decay=0.9,
    ema_start=0,
    accumulate=1,
)
PICTURES = {
    "image": np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8),
    "input_ids": np.arange(96).reshape(8, 12),
    "weight": np.ones(8, np.float32),
}
# Most laws are those of the UNet's training: prepared batches compile twice as fast.
BATCH = {
    "latent_mean": twins.random(8, 8, 8, 4),
    "latent_std": np.full((8, 8, 8, 4), 0.1, np.float16),
    "text_states": twins.random(8, 12, 16).astype(np.float16),
    "weight": np.ones(8, np.float32),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Small networks: their structure, what stays of them, and what is trained."""

    networks: steps.Networks
    frozen: steps.Frozen
    trained: Any

    def start(self, mesh: jax.sharding.Mesh, *, seed: int = 0) -> tuple[steps.TrainState, steps.Frozen]:
        state = steps.init_state(jax.tree.map(jnp.copy, self.trained), OPTIMIZER, jax.random.key(seed))
        frozen = self.frozen
        return sharding.put((state, frozen), sharding.kept(mesh, (state, frozen)))

    def step(self, mesh: jax.sharding.Mesh, **changes: Any) -> Any:
        key = (id(self), mesh, *sorted(changes.items()))
        if key not in COMPILED:
            schedule = NoiseSchedule.from_config(config(SD, "v_prediction"))
            options = dataclasses.replace(OPTIONS, **changes)
            COMPILED[key] = steps.make_train_step(self.networks, schedule, OPTIMIZER, options, mesh), self
        return COMPILED[key][0]


COMPILED: dict[Any, Any] = {}  # several laws are told of the same program


def filled(build: Any) -> tuple[Any, Any]:
    """Structure and random parameters; drawn by NumPy, as JAX would compile a program for each shape."""
    graphdef, abstract = nnx.split(nnx.eval_shape(build))
    rng = np.random.default_rng(0)

    def fill(x: Any) -> jax.Array:
        drawn = (
            rng.normal(0, np.prod(x.shape[:-1]) ** -0.5, x.shape) if len(x.shape) > 1 else rng.uniform(0, 1, x.shape)
        )
        return jnp.asarray(drawn, x.dtype)

    return graphdef, jax.tree.map(fill, abstract)


ADAPTED = lora.Targets(
    self_attention_rank=4, cross_attention_rank=4, attention_out=True, conv_ratio=0.2, first_layer=True, last_layer=True
)


def setting(*, with_lora: bool = False, remat: str = "none", dtype: str = "float32") -> Setting:
    def unet() -> UNet2DConditionModel:
        network = UNet2DConditionModel(UNetConfig(**small.UNET), dtype=dtype, rngs=nnx.Rngs(0))
        network.set_remat(remat)
        return network

    unet_def, params = filled(unet)
    vae_def, vae = filled(
        lambda: AutoencoderKL(VAEConfig(**twins.SMALL_VAE, layers_per_block=1), dtype=dtype, rngs=nnx.Rngs(0))
    )
    clip = CLIPTextConfig(**twins.SMALL_CLIP | small.CLIP)
    text_def, text = filled(lambda: CLIPTextModel(clip, dtype=dtype, rngs=nnx.Rngs(0)))
    networks = steps.Networks(unet_def, vae_def, text_def)
    if with_lora:
        return Setting(networks, steps.Frozen(params, vae, text), lora.init(params, jax.random.key(1), ADAPTED))
    return Setting(networks, steps.Frozen(None, vae, text), params)


def mesh_of(data: int = 1, fsdp: int = 1) -> jax.sharding.Mesh:
    return sharding.make_mesh(data, fsdp, jax.devices()[: data * fsdp])


ONE = mesh_of()


def run(
    setting: Setting, count: int, *, mesh: jax.sharding.Mesh = ONE, seed: int = 0, batch: dict = BATCH, **changes: Any
) -> tuple[steps.TrainState, list[float]]:
    """State and losses after `count` steps."""
    step, (state, frozen) = setting.step(mesh, **changes), setting.start(mesh, seed=seed)
    rows = sharding.put_rows(mesh, batch, 8)
    losses = []
    for _ in range(count):
        state, metrics = step(state, frozen, rows)
        losses.append(float(metrics["loss"]))
    return state, losses


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(leaves(a), leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def kept_parts(state: steps.TrainState) -> tuple[Any, ...]:
    return state.trained, state.ema, state.opt_state


@pytest.fixture(scope="module")
def full() -> Setting:
    return setting()


def test_the_same_key_gives_the_same_run_and_another_does_not(full: Setting) -> None:
    one, losses = run(full, 3)
    two, again = run(full, 3)
    assert losses == again
    assert_same(kept_parts(one), kept_parts(two))
    assert run(full, 3, seed=1)[1] != losses


def test_the_step_draws_by_its_own_number(full: Setting) -> None:
    _, losses = run(full, 1)
    state, frozen = full.start(ONE)
    _, metrics = full.step(ONE)(dataclasses.replace(state, step=state.step + 1), frozen, BATCH)
    assert float(metrics["loss"]) != losses[0]


@pytest.mark.parametrize(("data", "fsdp"), [(8, 1), (1, 8), (2, 4)])
def test_the_mesh_changes_nothing(full: Setting, data: int, fsdp: int) -> None:
    one, losses = run(full, 4, batch=PICTURES)
    many, others = run(full, 4, batch=PICTURES, mesh=mesh_of(data, fsdp))
    np.testing.assert_allclose(others, losses, rtol=1e-5)
    for a, b in zip(leaves(one.ema), leaves(many.ema), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)  # Adam's first steps are signs: rounding near zero shows


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_every_device_keeps_its_share(with_lora: bool) -> None:
    mesh = mesh_of(1, 8)
    state, _ = run(setting(with_lora=with_lora), 1, mesh=mesh)
    arrays = [x for x in jax.tree.leaves(kept_parts(state)) if x.ndim > 1]  # others are whole, and small but in a test
    whole = sum(x.nbytes for x in arrays)
    here = jax.devices()[3]
    share = sum(s.data.nbytes for x in arrays for s in x.addressable_shards if s.device == here)
    assert share / whole < 1.15 / 8 or with_lora  # adapters of rank 4 are 8 to 32 numbers long
    assert share / whole < 0.5


@pytest.mark.parametrize(("accumulate", "mesh"), [(4, ONE), (2, mesh_of(1, 2))], ids=["one", "fsdp"])
def test_parts_add_up_to_the_batch(full: Setting, accumulate: int, mesh: jax.sharding.Mesh) -> None:
    weighted = BATCH | {"weight": np.array([1, 1, 0, 1, 1, 1, 0, 1], np.float32)}
    one, losses = run(full, 2, batch=weighted)
    parts, others = run(full, 2, batch=weighted, accumulate=accumulate, mesh=mesh)
    np.testing.assert_allclose(others, losses, rtol=2e-6)
    for a, b in zip(
        leaves(optax.tree.get(one.opt_state, "mu")), leaves(optax.tree.get(parts.opt_state, "mu")), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("remat", ["elementwise", "resnets", "attentions", "blocks"])
def test_recomputing_changes_no_number_and_holds_less(full: Setting, remat: str) -> None:
    _, losses = run(full, 2)
    again = setting(remat=remat)
    np.testing.assert_allclose(run(again, 2)[1], losses, rtol=1e-6)

    def kept_bytes(of: Setting) -> int:
        loss = steps.make_loss(of.networks, NoiseSchedule.from_config(config(SD, "v_prediction")), OPTIONS, ONE)

        def backward(trained: Any, batch: Any) -> Any:
            draws = steps.draw(jax.random.key(0), flow.UNIFORM, of.networks, of.frozen, batch, 0.0)
            found = steps.encoded(of.networks, of.frozen, batch)
            return jax.vjp(lambda p: loss(steps.unet_params(p, None, 1.0), found, draws), trained)[1]

        kept = jax.eval_shape(backward, of.trained, BATCH)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))

    assert kept_bytes(again) < 0.9 * kept_bytes(full)


def test_adapters_are_trained_alike_where_blocks_gather_and_compute_again() -> None:
    again, plain = (setting(with_lora=True, remat=remat) for remat in ("blocks", "none"))
    np.testing.assert_allclose(run(again, 2, mesh=mesh_of(2, 2))[1], run(plain, 2)[1], rtol=2e-6)


def test_weights_that_are_gathered_again_change_no_number(full: Setting) -> None:
    again, mesh = setting(remat="gathers"), mesh_of(2, 2)
    np.testing.assert_allclose(run(again, 2, mesh=mesh)[1], run(full, 2)[1], rtol=2e-6)

    def gathers(of: Setting) -> int:
        state, frozen = of.start(mesh)
        lowered = of.step(mesh).lower(state, frozen, sharding.put_rows(mesh, BATCH, 8))
        return lowered.compile().as_text().count(" all-gather(")

    assert gathers(again) > 1.5 * gathers(setting(remat="elementwise"))


def test_half_precision_keeps_float32_masters() -> None:
    half = setting(dtype="bfloat16")
    state, losses = run(half, 20, compute_dtype="bfloat16", mesh=mesh_of(2, 2))
    assert {x.dtype for x in jax.tree.leaves(kept_parts(state)) if jnp.issubdtype(x.dtype, jnp.floating)} == {
        jnp.dtype("float32")
    }
    np.testing.assert_allclose(losses, run(setting(), 20)[1], rtol=0.05)


def test_rows_without_weight_count_for_nothing(full: Setting) -> None:
    weight = np.array([1, 0, 1, 1, 0, 1, 1, 1], np.float32)
    other = BATCH["latent_mean"] * weight[:, None, None, None]
    one, losses = run(full, 2, batch=BATCH | {"weight": weight})
    two, others = run(full, 2, batch=BATCH | {"weight": weight, "latent_mean": other})
    assert losses == others
    assert_same(kept_parts(one), kept_parts(two))
    assert int(one.bad_examples) == 4
    assert losses != run(full, 2)[1]


def test_a_step_that_is_not_finite_is_skipped_and_counted(full: Setting) -> None:
    step, (state, frozen) = full.step(ONE), full.start(ONE)
    state, _ = step(state, frozen, BATCH)
    before = [x.copy() for x in leaves(kept_parts(state))]
    for n in range(1, 4):
        state, metrics = step(state, frozen, BATCH | {"noise": np.full((8, 8, 8, 4), np.nan, np.float32)})
        assert not np.isfinite(float(metrics["loss"]))
        assert (int(state.bad_streak), int(state.skipped_steps), int(state.step)) == (n, n, n + 1)
    assert_same(before, kept_parts(state))
    state, _ = step(state, frozen, BATCH | {"weight": np.zeros(8, np.float32)})
    assert (int(state.bad_streak), int(state.bad_examples)) == (4, 8)
    assert_same(before, kept_parts(state))
    state, metrics = step(state, frozen, BATCH)
    assert (int(state.bad_streak), int(state.skipped_steps), int(metrics["skipped_steps"])) == (0, 4, 4)
    assert np.isfinite(float(metrics["loss"]))


def test_prepared_batches_are_what_pictures_become(full: Setting) -> None:
    batch = jax.tree.map(jnp.asarray, PICTURES)
    mean, std, text = jax.jit(lambda batch: steps.encoded(full.networks, full.frozen, batch)[:3])(batch)
    prepared = {"latent_mean": mean, "latent_std": std, "text_states": text, "weight": batch["weight"]}
    losses = run(full, 2, batch=PICTURES)[1]
    np.testing.assert_allclose(run(full, 2, batch=prepared)[1], losses, rtol=1e-6)
    in_parts = run(full, 2, mesh=mesh_of(2, 2), batch=PICTURES, accumulate=2)[1]
    np.testing.assert_allclose(in_parts, losses, rtol=2e-6)
    without_std = {name: x for name, x in prepared.items() if name != "latent_std"}
    assert run(full, 1, batch=without_std)[1] != run(full, 1, batch=PICTURES)[1]
    means = run(full, 1, batch=prepared, latents="mean")[1]
    np.testing.assert_allclose(means, run(full, 1, batch=without_std)[1], rtol=1e-6)


@pytest.mark.parametrize("name", get_args(objectives.Name))
@pytest.mark.parametrize(
    "times",
    [
        flow.TimeDistribution("logit_normal", 1.5, 1e-4),
        flow.TimeDistribution("logit_normal", -1.5, 1e-4, begin="last_timestep"),
        flow.TimeDistribution(shift=9.0),
    ],
)
def test_every_objective_is_trained_at_the_times_that_it_names(
    full: Setting, monkeypatch: pytest.MonkeyPatch, name: objectives.Name, times: flow.TimeDistribution
) -> None:
    """What the network is told of time, in a step whose loss it is: the timesteps of all examples of a batch."""
    raw = Alignment(timestep=False, state=False, velocity=False, raw_time=True)
    if name != "diff2flow":
        times = dataclasses.replace(times, begin="zero")
    objective = Objective(name, raw if name == "flow_matching" else Alignment(), times)

    def told(_self: Any, x: jax.Array, tau_B: jax.Array, _text: jax.Array) -> jax.Array:
        jax.debug.callback(lambda tau_B: seen.append(tau_B), tau_B)
        return jnp.zeros_like(x)

    seen: list[np.ndarray] = []
    monkeypatch.setattr(UNet2DConditionModel, "__call__", told)
    options, schedule = (
        dataclasses.replace(OPTIONS, objective=objective),
        NoiseSchedule.from_config(config(SD, "epsilon")),
    )
    step = steps.make_train_step(full.networks, schedule, OPTIMIZER, options, ONE)
    state, frozen = full.start(ONE)
    for _ in range(20):
        state, _ = step(state, frozen, BATCH)
    jax.effects_barrier()
    tau = np.concatenate(seen)
    assert tau.shape == (160,)
    rank = {"flow_matching": lambda t: t, "diffusion": lambda t: np.floor(1000 * (1 - t))}.get(
        name, lambda t: np.asarray(alignment.diffusion_timestep(schedule, t))
    )
    if times.name == "logit_normal":  # so narrow that it is one time
        first = objectives.first_time(objective, schedule)
        t = first + (1 - first) / (1 + np.exp(-times.mean))
        assert (first > 0) == (times.begin == "last_timestep")
        np.testing.assert_allclose(tau, rank(t), rtol=1e-3, atol=0.5 if name != "flow_matching" else 0)
    else:  # a tenth of them nearer to data than t = 1/2, which without a shift is half of them
        near_data = tau > 0.5 if name == "flow_matching" else tau < rank(0.5)
        assert near_data.mean() == pytest.approx(0.1, abs=0.08)


def test_training_in_the_published_convention(full: Setting) -> None:
    objective = Objective(alignment=Alignment(convention="reference"))
    state, losses = run(full, 60, objective=objective)
    assert int(state.skipped_steps) == 0 and np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])
    assert losses[0] != pytest.approx(run(full, 1)[1][0], rel=1e-4)


def test_training_learns(full: Setting) -> None:
    _, losses = run(full, 60)
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10])


@pytest.mark.parametrize("start", [0, 2])
def test_the_average_follows_its_law(full: Setting, start: int) -> None:
    step, (state, frozen) = full.step(ONE, ema_start=start), full.start(ONE)
    expected = leaves(state.ema)
    for n in range(4):
        state, _ = step(state, frozen, BATCH)
        decay = min(0.9, 1 - (1 + max(n - start, 0)) ** -0.75)
        expected = [decay * e + (1 - decay) * new for e, new in zip(expected, leaves(state.trained), strict=True)]
    for e, a in zip(expected, leaves(state.ema), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-6)


def test_without_an_average_training_is_the_same_and_holds_less(full: Setting) -> None:
    (state, frozen), kept = full.start(ONE), run(full, 3)[0]
    state = dataclasses.replace(state, ema=None)
    for _ in range(3):
        state, _ = full.step(ONE)(state, frozen, BATCH)
    for a, b in zip(leaves(state.trained), leaves(kept.trained), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)  # 1% of a step: rounding shows where Adam divides by little
    assert state.ema is None and state.averaged is state.trained


def test_adapters_are_all_that_is_trained(full: Setting) -> None:
    adapted = setting(with_lora=True)
    before = leaves(adapted.frozen)
    state, losses = run(adapted, 2)
    wanted = jax.tree.map(jnp.shape, adapted.trained)
    moments = (optax.tree.get(state.opt_state, name) for name in ("mu", "nu"))
    for held in (state.trained, state.ema, *moments):
        assert jax.tree.map(jnp.shape, held) == wanted
    assert sum(x.ndim > 0 for x in leaves(state.opt_state)) == 2 * len(leaves(adapted.trained))  # others are counters
    assert_same(before, adapted.frozen)
    assert any(entry.b.any() for entry in state.trained.values() if isinstance(entry, lora.Adapter))
    # Zero-initialised adapters begin where the whole network begins.
    np.testing.assert_allclose(losses[0], run(full, 1)[1][0], rtol=1e-6)


def test_the_old_state_is_donated(full: Setting) -> None:
    state, frozen = full.start(ONE)
    full.step(ONE)(state, frozen, BATCH)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.trained))


@pytest.mark.parametrize("devices", [1, 8])
def test_gradients_of_convolutions_are_laid_out_as_their_parameters(devices: int) -> None:
    """For a GPU; where each device holds a share it is that of its own."""
    mesh = sharding.make_mesh(-1, max(devices // 2, 1), jax.devices()[:devices])
    grads = {"convolution": twins.random(3, 3, 8, 16), "linear": twins.random(8, 4), "norm": twins.random(4)}
    grads = jax.device_put(grads, sharding.kept(mesh, grads))
    laid_out = jax.jit(lambda grads: steps.laid_out(mesh, sharding.split(mesh, grads)))
    chex.assert_trees_all_equal(laid_out(grads), grads)
    program = laid_out.lower(grads)
    assert "all-gather" not in program.compile().as_text()
    assert program.as_text().count("LayoutConstraint") == 1
    assert steps.as_kept(mesh, grads) is grads  # here are no GPUs
