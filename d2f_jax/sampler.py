"""From noise to a sample by name: which solver, along which grid."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from d2f_jax import alignment, sampling, sde
from d2f_jax.alignment import Alignment
from d2f_jax.errors import InputError
from d2f_jax.flow import Begin
from d2f_jax.sampling import Adaptive, Predict, Solver, Spacing
from d2f_jax.schedule import NoiseSchedule
from d2f_jax.sde import SDE

SamplerName = Literal[Solver, Adaptive, "sde_euler", "sde_heun", "ddim", "ddim_on_flow_grid"]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How to sample.

    - "euler", "heun", "midpoint", "rk4": steps in flow time, of 1, 2, 2 and 4 evaluations of the network.
    - "dopri5", "dopri8", "bosh3", "adaptive_heun": as many steps as `rtol` and `atol` ask for, of each example.
    - "sde_euler", "sde_heun": random steps in flow time, as `sde` has them.
    - "ddim": the checkpoint's own timesteps, for a diffusion model as it came; with `eta=1` it is DDPM, whose last step
      always goes to data. `temperature` scales the noise that `eta` draws, `noise_dropout` is the share of it left out.
    - "ddim_on_flow_grid": the flow grid's timesteps, which gives the samples of "euler" of an exactly aligned flow.

    `shift` above 1 makes the flow's steps denser near noise. They `begin` at the last diffusion timestep's flow time,
    before which an aligned flow knows nothing, or at "zero", as the paper's published code has them. The `spacing` of
    ddim's timesteps is the checkpoint's own if None. Raises InputError for what does not go together.
    """

    name: SamplerName = "euler"
    shift: float = 1.0
    begin: Begin = "last_timestep"
    spacing: Spacing | None = None
    eta: float = 0.0
    temperature: float = 1.0
    noise_dropout: float = 0.0
    sde: SDE = dataclasses.field(default_factory=SDE)
    rtol: float = 1e-3
    atol: float = 1e-4

    def __post_init__(self) -> None:
        if self.name not in get_args(SamplerName):
            raise InputError(f"sampler={self.name!r} is not one of {', '.join(get_args(SamplerName))}")
        if self.begin not in get_args(Begin):
            raise InputError(f"begin={self.begin!r} is not one of {', '.join(get_args(Begin))}")
        if self.begin == "zero" and self.is_ddim:
            raise InputError(f"begin='zero' is of steps in flow time, not of sampler={self.name!r}; use euler")
        if self.spacing is not None and self.name != "ddim":
            raise InputError(f"spacing={self.spacing!r} is ddim's, not of sampler={self.name!r}; use ddim, or shift")
        if self.eta and not self.is_ddim:
            raise InputError(f"eta={self.eta} is DDIM's, not of sampler={self.name!r}; use ddim or an sde_ sampler")
        if not 0 <= self.eta <= 1:
            raise InputError(f"eta={self.eta} is not between 0, deterministic, and 1, DDPM")
        if not self.eta and (self.temperature, self.noise_dropout) != (1, 0):
            raise InputError(
                f"temperature={self.temperature}, noise_dropout={self.noise_dropout} are of the noise that DDIM draws "
                "with eta above 0; set eta, or leave them at 1 and 0"
            )
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature={self.temperature}: give 0 or more, 1 for noise as it is drawn")
        if not 0 <= self.noise_dropout < 1:
            raise InputError(f"noise_dropout={self.noise_dropout}: give a share from 0 to less than 1")
        if self.shift <= 0:
            raise InputError(f"shift={self.shift}: give a positive number, 1 for uniform steps")
        if self.name == "ddim" and self.shift != 1:
            raise InputError(f"shift={self.shift} is of flow time, and ddim has its own; use ddim_on_flow_grid")
        if self.is_adaptive and self.shift != 1:
            raise InputError(f"shift={self.shift} is of a grid's steps, and {self.name} finds its own; use 1")

    @property
    def is_ddim(self) -> bool:
        return self.name in ("ddim", "ddim_on_flow_grid")

    @property
    def is_adaptive(self) -> bool:
        """Whether it takes as many steps as it needs, whatever number of them is asked for."""
        return self.name in get_args(Adaptive)

    @property
    def is_sde(self) -> bool:
        return self.name in ("sde_euler", "sde_heun")

    @property
    def compiled_for(self) -> "Sampler":
        """What the program depends on: the rest is in the grid that it is given."""
        return dataclasses.replace(self, shift=1.0, begin="last_timestep", spacing=None)

    def check(self, how: Alignment, *, at_noise: bool = True) -> None:
        """Raises InputError for a flow that lacks what the sampler builds on.

        DDIM needs a diffusion model's states, which a flow has that is aligned and starts at noise; a random sampler
        needs the score, which is known of a flow from noise.
        """
        if (self.is_ddim or self.is_sde) and not at_noise:
            raise InputError(f"sampler={self.name!r} starts at noise, this model's flow at the picture; use euler")
        if self.is_ddim and not how.complete:
            raise InputError(
                f"sampler={self.name!r} is of diffusion models and of flows aligned with them, and this model's flow "
                "is not; use euler"
            )

    def grid(
        self,
        schedule: NoiseSchedule,
        how: Alignment,
        scheduler_config: Mapping[str, Any],
        num_steps: int,
        *,
        at_noise: bool = True,
    ) -> np.ndarray:
        """Flow times, or DDIM's timesteps, float32; padded so that one program serves many numbers of steps.

        A flow that does not start `at_noise` has no diffusion model's first state, and begins at 0. Raises InputError
        as `check`, and for a number of steps that the sampler cannot take.
        """
        self.check(how, at_noise=at_noise)
        length = max(64, 1 << (num_steps - 1).bit_length())
        late = how.complete and at_noise and self.begin == "last_timestep"
        flow_grid = sampling.flow_grid(schedule, num_steps, shift=self.shift, aligned=late)
        if self.is_adaptive:
            return flow_grid[[0, -1]]
        match self.name:
            case "sde_euler" | "sde_heun":
                noisy = sde.grid(self.sde, float(flow_grid[0]), num_steps, self.shift)
                return sampling.pad_grid(noisy, length + 1)
            case "ddim":
                timesteps = sampling.ddim_timesteps(
                    schedule.num_train_timesteps,
                    num_steps,
                    self.spacing or scheduler_config.get("timestep_spacing", "leading"),
                    scheduler_config.get("steps_offset", 0),
                )
                return sampling.pad_timesteps(timesteps, length)
            case "ddim_on_flow_grid":
                timesteps = np.asarray(alignment.diffusion_timestep(schedule, flow_grid[:-1]))
                return sampling.pad_timesteps(timesteps, length)
            case _:
                return sampling.pad_grid(flow_grid, length + 1)

    def sample(
        self,
        schedule: NoiseSchedule,
        how: Alignment,
        predict: Predict,
        noise: jax.Array,
        grid: jax.Array,
        *,
        set_alpha_to_one: bool,
        keys_B: jax.Array,
    ) -> jax.Array:
        """From `noise` [B, ...] to data along `grid`, float32.

        `set_alpha_to_one` is DDIM's: whether its last step goes to no noise at all or to the first timestep's.
        """
        if self.name in ("ddim", "ddim_on_flow_grid"):  # is_ddim, so that types tell what is left
            final, keys = self._final(schedule, set_alpha_to_one), keys_B if self.eta else None
            fresh = {name: getattr(self, name) for name in ("eta", "temperature", "noise_dropout")}
            return sampling.ddim(schedule, predict, noise, grid, final, **fresh, keys_B=keys)
        field = alignment.velocity_field(schedule, predict, how)
        x = sampling.from_noise(noise, grid[0])
        match self.name:
            case "dopri5" | "dopri8" | "bosh3" | "adaptive_heun":
                from d2f_jax import adaptive

                return adaptive.solve(field, x, grid[0], grid[-1], self.name, rtol=self.rtol, atol=self.atol)
            case "sde_euler" | "sde_heun":
                solver = "euler" if self.name == "sde_euler" else "heun"
                return sde.solve(self.sde, field, x, grid, keys_B, solver, how.flow_path)
            case "euler" | "heun" | "midpoint" | "rk4":
                return sampling.solve(field, x, grid, self.name)

    def trajectory(
        self, schedule: NoiseSchedule, how: Alignment, predict: Predict, noise: jax.Array, grid: jax.Array
    ) -> jax.Array:
        """The flow's states [B, N+1, ...] on the way from `noise` [B, ...], of which `sample` gives the last.

        Raises InputError for a sampler that takes no steps of its own along the flow.
        """
        field, x = alignment.velocity_field(schedule, predict, how), sampling.from_noise(noise, grid[0])
        match self.name:
            case "euler" | "heun" | "midpoint" | "rk4":
                return jnp.moveaxis(sampling.trajectory(field, x, grid, self.name), 0, 1)
            case name:
                raise InputError(f"sampler={name!r} tells no trajectory; use euler, heun, midpoint or rk4")

    def invert(
        self,
        schedule: NoiseSchedule,
        how: Alignment,
        predict: Predict,
        data: jax.Array,
        grid: jax.Array,
        *,
        set_alpha_to_one: bool,
    ) -> jax.Array:
        """The noise that is turned into `data` [B, ...], by the same steps backwards; DDIM's are `ddim_inverse`'s.

        Raises InputError for a random sampler, and for DDIM's where data without noise would have to tell its noise.
        """
        if self.is_ddim and not self.eta:
            if schedule.prediction_type == "sample" and self._ends_at_data(set_alpha_to_one):
                raise InputError(
                    f"sampler={self.name!r} cannot invert prediction_type='sample', which tells no noise of data; use "
                    "euler"
                )
            return sampling.ddim_inverse(schedule, predict, data, grid, self._final(schedule, set_alpha_to_one))
        field = alignment.velocity_field(schedule, predict, how)
        match self.name:
            case "euler" | "heun" | "midpoint" | "rk4":
                x = sampling.solve(field, data, sampling.reversed_grid(grid), self.name)
            case "dopri5" | "dopri8" | "bosh3" | "adaptive_heun":
                from d2f_jax import adaptive

                x = adaptive.solve(field, data, grid[-1], grid[0], self.name, rtol=self.rtol, atol=self.atol)
            case name:
                eta = f" with eta={self.eta}" if self.eta else ""
                raise InputError(
                    f"sampler={name!r}{eta} is random and has no way back; invert with euler, another solver of "
                    "the flow, or ddim"
                )
        return sampling.to_noise(x, jnp.asarray(grid)[0])

    def _ends_at_data(self, set_alpha_to_one: bool) -> bool:
        """DDIM's steps on the flow's grid and DDPM's do, whatever a scheduler says."""
        return set_alpha_to_one or self.name == "ddim_on_flow_grid" or self.eta == 1

    def _final(self, schedule: NoiseSchedule, set_alpha_to_one: bool) -> ArrayLike:
        """The signal power at DDIM's end."""
        return 1.0 if self._ends_at_data(set_alpha_to_one) else schedule.alphas_cumprod[0]
