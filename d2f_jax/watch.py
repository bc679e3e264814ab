"""What is seen of a run while it goes on: metrics and speed, the held-out loss, samples, a profiler's trace."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from d2f_jax import chips, comparison, distributed, report
from d2f_jax import step as steps
from d2f_jax.errors import InputError
from d2f_jax.pipeline import Pipeline
from d2f_jax.program import Config
from d2f_jax.settings import eval_sampler
from d2f_jax.subjects import Subject


@dataclasses.dataclass(frozen=True)
class Insight:
    """How to look into a state: `pipeline(unet_params)` samples with it, `validation_loss(unet_params)` judges it.

    `unet_params(state)` are the averaged ones. `validation_loss` is None where nothing is held out. `count` examples
    of `subject` are drawn.
    """

    learning_rate: Callable[[int], Any]
    unet_params: Callable[[steps.TrainState], Any]
    pipeline: Callable[[Any], Pipeline]
    validation_loss: Callable[[Any], dict[str, float]] | None
    subject: Subject
    count: int


class Watch:
    """Told of every step; looks at its metrics when the next one is already under way, so that no device waits.

    Only the main process shows and writes, but all of them compute alike.
    """

    def __init__(
        self, config: Config, workdir: Path, mesh: Mesh, writer: report.MetricsWriter, insight: Insight, first: int
    ) -> None:
        self._config, self._workdir, self._writer, self._insight = config, workdir, writer, insight
        self._mesh, self._first, self._flops = mesh, first, None
        self._pending: tuple[int, steps.Metrics] | None = None
        self._bad_streak, self._tracing = 0, False
        size, last = config.train.batch_size, config.train.num_steps
        hidden = not distributed.is_main() or first >= last
        self._bar = tqdm(total=last * size, initial=first * size, desc="training", unit="image", disable=hidden)
        self._clock = time.monotonic(), first

    def count_flops(self, flops_per_step: int) -> None:
        """Of all devices together."""
        self._flops = flops_per_step

    def start_clock(self) -> None:
        """What came before, such as compilation, does not count."""
        self._clock = time.monotonic(), self._first

    def see(self, step: int, metrics: steps.Metrics) -> None:
        """Takes the metrics of `step`; looks at those before. Raises as `settle`."""
        self.settle()
        self._pending = step, metrics
        self._bar.update(self._config.train.batch_size)
        self._trace(step)

    def settle(self) -> int:
        """Looks at what is still out. Returns how many steps in a row, up to the last one, were skipped.

        Raises FloatingPointError if they are too many, and InputError if too many examples were damaged.
        """
        if self._pending is not None:
            (step, metrics), self._pending = self._pending, None
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self._bad_streak = int(values.pop("bad_streak"))
            self._judge(step, values)
            train = self._config.train
            if step % train.log_every == 0 or step in (1, train.num_steps):
                applied = step - 1 - int(values["skipped_steps"])  # skipped steps do not move the schedule
                values["learning_rate"] = float(self._insight.learning_rate(applied))
                self._writer.write(step, values | self._speed(step))
                self._bar.set_postfix(loss=f"{values['loss']:.4f}")
        return self._bad_streak

    def sync(self) -> None:
        """Looks at what is still out, and makes it last as a checkpoint does. Raises as `settle`."""
        self.settle()
        self._writer.sync()

    def evaluate(self, step: int, state: steps.TrainState) -> None:
        """The held-out loss, and samples of each number of steps but at the end, where the comparison draws more."""
        self.settle()
        params = self._insight.unet_params(state)
        if self._insight.validation_loss is not None:
            self._writer.write(step, self._insight.validation_loss(params))
        if step < self._config.train.num_steps:
            config = self._config.eval
            drawn = comparison.compare(
                [comparison.Contender(f"step {step}", self._insight.pipeline(params), eval_sampler(self._config))],
                self._insight.subject,
                self._insight.count,
                step_counts=config.step_counts,
                batch_size=config.batch_size,
                shown=self._insight.count,
            )
            picture = comparison.picture(drawn)
            self._writer.image(step, "samples", picture)
            if distributed.is_main():
                (self._workdir / "samples").mkdir(exist_ok=True)
                picture.save(self._workdir / "samples" / f"step_{step:06}.png")
        self._clock = time.monotonic(), step

    def close(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
        self._bar.close()

    def _judge(self, step: int, values: dict[str, float]) -> None:
        train, data = self._config.train, self._config.data
        if self._bad_streak >= train.max_bad_steps:
            raise FloatingPointError(
                f"{self._bad_streak} steps in a row up to step {step} were skipped: loss {values['loss']}, gradient "
                f"norm {values['grad_norm']}; start again from an earlier checkpoint or in a new --workdir with "
                "a lower config.train.learning_rate, more warm-up, or config.compute_dtype=float32"
            )
        if values["bad_examples"] > data.max_damaged:
            raise InputError(
                f"{values['bad_examples']:.0f} damaged examples were left out up to step {step}, more than "
                f"config.data.max_damaged={data.max_damaged}; mend the data (they are named above), or allow more"
            )

    def _speed(self, step: int) -> dict[str, float]:
        """Since the last time, without compilation and evaluation."""
        (began, counted), now = self._clock, time.monotonic()
        self._clock = now, step
        if step == counted or step == self._first + 1:
            return {}
        seconds = (now - began) / (step - counted)
        speed = {"images_per_second": self._config.train.batch_size / seconds}
        if self._flops is not None:
            speed["tflops_per_device"] = self._flops / seconds / self._mesh.size / 1e12
            peak = chips.peak_tflops(self._mesh.devices.flat[0])
            if peak is not None:
                speed["mfu"] = speed["tflops_per_device"] / peak
        return speed

    def _trace(self, step: int) -> None:
        """Writes what the profiler sees from the first to the last of `profile_steps`, for TensorBoard or XProf."""
        if self._config.train.profile_steps:
            first, last = self._config.train.profile_steps
            if step == first - 1 or (step == first == self._first + 1):
                jax.profiler.start_trace(str(self._workdir / "profile"))
                self._tracing = True
            elif self._tracing and step >= last:
                self.settle()
                jax.profiler.stop_trace()
                self._tracing = False
