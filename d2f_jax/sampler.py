"""From noise to a sample by name: which solver, along which grid."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from d2f_jax import alignment, sampling, sde
from d2f_jax.alignment import Alignment
from d2f_jax.errors import InputError
from d2f_jax.sampling import Predict
from d2f_jax.schedule import NoiseSchedule
from d2f_jax.sde import SDE

SamplerName = Literal[
    "euler", "heun", "midpoint", "rk4", "dopri5", "sde_euler", "sde_heun", "ddim", "ddim_on_flow_grid"
]


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How to sample.

    - "euler", "heun", "midpoint", "rk4": steps in flow time, of 1, 2, 2 and 4 evaluations of the network.
    - "dopri5": as many steps as `rtol` and `atol` ask for.
    - "sde_euler", "sde_heun": random steps in flow time, as `sde` has them.
    - "ddim": the checkpoint's own timesteps, for a diffusion model as it came; with `eta=1` it is DDPM.
    - "ddim_on_flow_grid": the flow grid's timesteps, which gives the samples of "euler".

    `shift` above 1 makes the flow's steps denser near noise. Raises InputError for what does not go together.
    """

    name: SamplerName = "euler"
    shift: float = 1.0
    eta: float = 0.0
    sde: SDE = dataclasses.field(default_factory=SDE)
    rtol: float = 1e-3
    atol: float = 1e-4

    def __post_init__(self) -> None:
        if self.name not in get_args(SamplerName):
            raise InputError(f"sampler={self.name!r} is not one of {', '.join(get_args(SamplerName))}")
        if self.eta and not self.name.startswith("ddim"):
            raise InputError(f"eta={self.eta} is DDIM's, not of sampler={self.name!r}; use ddim or an sde_ sampler")
        if not 0 <= self.eta <= 1:
            raise InputError(f"eta={self.eta} is not between 0, deterministic, and 1, DDPM")
        if self.shift <= 0:
            raise InputError(f"shift={self.shift}: give a positive number, 1 for uniform steps")
        if self.name == "ddim" and self.shift != 1:
            raise InputError(f"shift={self.shift} is of flow time, and ddim has its own; use ddim_on_flow_grid")

    @property
    def compiled_for(self) -> "Sampler":
        """What the program depends on: the shift is in the grid that it is given."""
        return dataclasses.replace(self, shift=1.0)

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

        A flow that does not start `at_noise` has no diffusion model's first state, and begins at 0.
        """
        length = max(64, 1 << (num_steps - 1).bit_length())
        flow_grid = sampling.flow_grid(schedule, num_steps, shift=self.shift, aligned=how.complete and at_noise)
        match self.name:
            case "dopri5":
                return flow_grid[[0, -1]]
            case "sde_euler" | "sde_heun":
                noisy = sde.grid(self.sde, float(flow_grid[0]), num_steps, self.shift)
                return sampling.pad_grid(noisy, length + 1)
            case "ddim":
                timesteps = sampling.ddim_timesteps(
                    schedule.num_train_timesteps,
                    num_steps,
                    scheduler_config.get("timestep_spacing", "leading"),
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
        if self.name in ("ddim", "ddim_on_flow_grid"):
            to_data = set_alpha_to_one or self.name == "ddim_on_flow_grid"
            final = 1.0 if to_data else schedule.alphas_cumprod[0]
            keys = keys_B if self.eta else None
            return sampling.ddim(schedule, predict, noise, grid, final, eta=self.eta, keys_B=keys)
        field = alignment.velocity_field(schedule, predict, how)
        x = sampling.from_noise(noise, grid[0])
        match self.name:
            case "dopri5":
                return sampling.solve_adaptive(field, x, grid[0], grid[-1], rtol=self.rtol, atol=self.atol)
            case "sde_euler" | "sde_heun":
                solver = "euler" if self.name == "sde_euler" else "heun"
                return sde.solve(self.sde, field, x, grid, keys_B, solver, how.flow_path)
            case "euler" | "heun" | "midpoint" | "rk4":
                return sampling.solve(field, x, grid, self.name)

    def invert(
        self, schedule: NoiseSchedule, how: Alignment, predict: Predict, data: jax.Array, grid: jax.Array
    ) -> jax.Array:
        """The noise that the flow turns into `data` [B, ...], by the same steps backwards.

        Raises InputError for a sampler that does not follow the flow.
        """
        field = alignment.velocity_field(schedule, predict, how)
        match self.name:
            case "euler" | "heun" | "midpoint" | "rk4":
                x = sampling.solve(field, data, sampling.reversed_grid(grid), self.name)
            case "dopri5":
                x = sampling.solve_adaptive(field, data, grid[-1], grid[0], rtol=self.rtol, atol=self.atol)
            case name:
                raise InputError(f"sampler={name!r} has no way back; invert with euler, heun, midpoint, rk4 or dopri5")
        return sampling.to_noise(x, jnp.asarray(grid)[0])
