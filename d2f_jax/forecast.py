"""What a run needs of a topology's chips, from its compiled program: memory, time at best, and the table of both."""

import dataclasses
import math
from typing import Any, Literal

import jax
from flax import nnx

from d2f_jax import blueprint, hlo, oracle, prior, program, report, settings, sharding, traffic
from d2f_jax.errors import InputError
from d2f_jax.oracle import Answer, Topology
from d2f_jax.program import Config
from d2f_jax.traffic import Work

Kind = Literal["train", "sample"]
_TOLD = {
    "overlapping": "at least",
    "serial": "one operation after another",
    "estimated": "as the compiler estimates",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes, FLOPs and seconds of one of `devices`, which are what JAX calls so: a TPU7x chip has two.

    The program runs `runs` times, as a training has steps, each time on `batch_size` images. They are `rows` of what is
    computed: depth is estimated `ensemble` times for each, and every device has as many. If it does not fit, all that
    is known is `memory`, of which it "needs" more than is "usable". `seconds` are `bounds`, of which "estimated" is
    of tiles found in a shorter search if `quick`. How often `unknown_loops` run is not known: they count as one round,
    or as the sampler's steps.
    """

    program: Kind
    topology: str
    slices: int
    chips: int
    devices: int
    mesh: dict[str, int]
    batch_size: int
    ensemble: int
    rows: int
    accumulate: int
    remat: str
    sampler_steps: int | None
    runs: int
    model: str
    data: str | None
    parameters: dict[str, int]
    useful_flops_per_image: float | None
    quick: bool
    compile_seconds: float
    memory: dict[str, int]
    fits: bool
    flops: int | None
    hbm: dict[str, int]
    collectives: dict[str, dict[str, int]]
    seconds: dict[str, float]
    unknown_loops: int

    @property
    def bound_by(self) -> str:
        return max(("compute", "HBM", "ICI"), key=self.seconds.__getitem__)

    def times(self) -> dict[str, dict[str, float]]:
        """Of one run of the program and of all: if everything overlaps, if nothing does, as the compiler estimates."""
        found = {}
        if self.fits:
            for name in ("overlapping", "serial", "estimated"):
                seconds = self.seconds[self.bound_by if name == "overlapping" else name]
                hours = self.runs * seconds / 3600
                speed = self.batch_size / seconds / self.chips
                found[name] = {"seconds": seconds, "images_per_second_per_chip": speed}
                found[name] |= {"hours": hours, "chip_hours": hours * self.chips}
        return found

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"bound_by": self.bound_by if self.fits else None, "times": self.times()}


def make_plan(config: Config, kind: Kind, where: Topology, quick: bool = False) -> Plan:
    """Compiles the program, unless it was before. Raises InputError for a config that no run could have."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, where.devices)
    settings.check_values(config)
    drawn, train = blueprint.load(config), kind == "train"
    networks = {name: nnx.state(getattr(drawn.pipeline, name)) for name in ("unet", "vae", "text_encoder")}
    parameters = {name: _count(params) for name, params in networks.items()}
    prior.check_steps(drawn.pipeline, config)
    if train:
        settings.check(config, mesh)
        parameters["trained"] = _count(blueprint.parameters(config, drawn)[1])
        useful = blueprint.useful_flops(config, drawn)
        size = rows = config.train.batch_size
        steps, ensemble = None, 1
        lowered = blueprint.lower_train(config, drawn, mesh)
    else:
        if (sampler := settings.eval_sampler(config)).is_adaptive:
            raise InputError(
                f"config.eval.sampler={sampler.name} takes as many steps as it needs; plan with another sampler"
            )
        useful, steps, size = None, max(config.eval.step_counts), config.eval.batch_size
        rows, ensemble = blueprint.rows_drawn(config, mesh), blueprint.estimates(config)
        lowered = blueprint.lower_sampler(config, drawn, mesh, steps)
    answer = oracle.ask(lowered, where, program.cache_folder() / "plans", quick)
    work = traffic.work(hlo.parse(answer.hlo), unknown_trips=steps or 1) if answer.fits else None
    return Plan(
        program=kind,
        topology=where.name,
        slices=where.slices,
        chips=where.chips,
        devices=len(where.devices),
        mesh=dict(mesh.shape),
        batch_size=size,
        ensemble=ensemble,
        rows=rows,
        accumulate=config.train.accumulate if train else 1,
        remat=config.remat if train else "none",
        sampler_steps=steps,
        runs=config.train.num_steps if train else 1,
        model=drawn.model,
        data=drawn.data if train else None,
        parameters=parameters,
        useful_flops_per_image=useful and useful / size,
        quick=quick,
        compile_seconds=answer.seconds,
        memory=_memory(answer, where),
        fits=answer.fits,
        flops=work and work.flops,
        hbm=work.hbm if work else {},
        collectives={k: {"count": n, "bytes": work.received[k]} for k, n in work.collectives.items()} if work else {},
        seconds=bounds(work, where) if work else {},
        unknown_loops=work.unknown_loops if work else 0,
    )


def bounds(work: Work, where: Topology) -> dict[str, float]:
    """Seconds that each resource is busy at least; "serial" adds up operations and collectives, nothing overlapping.

    An operation takes as long as its FLOPs or its bytes of HBM, whichever is longer. For "estimated" it takes the
    compiler's cycles, on the scale of `TPU.cycles`, if it tells them. Collectives use all links of a slice, which is
    their best; what slices exchange takes no time here.
    """
    tpu = where.tpu
    peak, bandwidth, links = (rate / tpu.devices for rate in (tpu.tflops * 1e12, tpu.hbm * 1e9, tpu.ici * 1e9))
    received = sum(size for kind, size in work.received.items() if kind != traffic.BETWEEN_SLICES)
    ici = received / (links * where.links) if where.links else 0.0
    serial = estimated = ici
    for (flops, moved, cycles), times in work.operations.items():
        alone = max(flops / peak, moved / bandwidth)
        serial += times * alone
        estimated += times * (alone if cycles is None else cycles / (tpu.cycles * 1e9))
    found = {"compute": work.flops / peak, "HBM": sum(work.hbm.values()) / bandwidth, "ICI": ici}
    return found | {"serial": serial, "estimated": estimated}


def table(plan: Plan) -> str:
    """Markdown, for people."""
    each = "chip" if plan.devices == plan.chips else f"device ({plan.devices // plan.chips} a chip)"
    of = f" of {plan.ensemble} estimates" if plan.ensemble > 1 else ""
    share = f"{plan.batch_size} images{of}, {plan.rows / plan.devices / plan.accumulate:g} on a {each}"
    share += f", in {plan.accumulate} parts" if plan.accumulate > 1 else ""
    if plan.program == "train":
        work = ["a step", f"{share}; remat {plan.remat}"]
    else:
        work = ["a batch", f"{share}; {plan.sampler_steps} steps of the sampler"]
    parameters = ", ".join(f"{name.replace('_', ' ')} {n / 1e6:.1f}M" for name, n in plan.parameters.items())
    rows = [["model", plan.model], ["parameters", parameters], ["data", plan.data or ""], work]
    rows.append([f"HBM of a {each}", verdict(plan)])
    if plan.fits:
        parts = [f"{name} {plan.memory[name] / 2**30:.2f}" for name in ("arguments", "temporaries", "program")]
        rows += [["of it, GiB", ", ".join(parts)], *_work_rows(plan, each), *_time_rows(plan)]
    slices = f"{plan.slices} x " if plan.slices > 1 else ""
    mesh = " x ".join(f"{name} {n}" for name, n in plan.mesh.items())
    header = [f"{plan.program} on {slices}{plan.topology}", f"{plan.chips} chip{'s' * (plan.chips > 1)}, mesh {mesh}"]
    return report.markdown_table(header, [row for row in rows if row[1]])


def verdict(plan: Plan) -> str:
    needs, usable = plan.memory["needs"] / 2**30, plan.memory["usable"] / 2**30
    if plan.fits:
        return f"{needs:.2f} of {usable:.2f} GiB: fits"
    return f"{needs:.2f} of {usable:.2f} GiB: does not fit, by {needs - usable:.2f} GiB at least"


def _memory(answer: Answer, where: Topology) -> dict[str, int]:
    parts = {"arguments": answer.arguments, "temporaries": answer.temporaries, "program": answer.code}
    return (parts if answer.fits else {}) | {"needs": answer.needs, "usable": int(where.tpu.usable_gib * 2**30)}


def _work_rows(plan: Plan, each: str) -> list[list[str]]:
    total = sum(plan.hbm.values())
    classes = {name: n for name, n in sorted(plan.hbm.items(), key=lambda item: -item[1]) if n > total / 1000}
    useful = plan.useful_flops_per_image
    rows = [["useful work of an image", _quantity(useful, "FLOP") if useful else ""]]
    rows.append([f"work of a {each}", _quantity(plan.flops or 0, "FLOP")])
    rows.append([f"HBM traffic of a {each}", _quantity(total, "B")])
    rows += [[f"- {name}", _quantity(n, "B")] for name, n in classes.items()]
    for kind, found in sorted(plan.collectives.items()):
        between = ", over a network whose speed is not known here" if kind == traffic.BETWEEN_SLICES else ""
        rows.append([f"{found['count']} x {kind}", f"{_quantity(found['bytes'], 'B')} come in{between}"])
    if plan.unknown_loops:
        rows.append(
            ["loops of unknown length", f"{plan.unknown_loops}, of {plan.sampler_steps or 1} rounds as counted"]
        )
    return rows


def _time_rows(plan: Plan) -> list[list[str]]:
    busy = ", ".join(f"{name} {_quantity(plan.seconds[name], 's')}" for name in ("compute", "HBM", "ICI"))
    rows = [["busy at least", f"{busy}: bound by {plan.bound_by}"]]
    for name, times in plan.times().items():
        speed = _quantity(times["images_per_second_per_chip"], "")
        told = f"{_quantity(times['seconds'], 's')}, {speed} images/s per chip"
        told += ", with tiles that were found quickly" if name == "estimated" and plan.quick else ""
        told += ", ICI at best" if plan.seconds["ICI"] and name != "overlapping" else ""
        if plan.program == "train":
            told += f"; {plan.runs} steps: {times['hours']:.2g} hours, {times['chip_hours']:.2g} chip-hours"
        rows.append([_TOLD[name], told])
    return rows


def _quantity(value: float, unit: str) -> str:
    """Three digits, with the prefix that makes them readable."""
    if not value:
        return f"0 {unit}".strip()
    power = min(max(math.floor(math.log(value, 1000) + 1e-4), -3), 5)
    return f"{value / 1000**power:.3g} {'nµm kMGTP'[power + 3].strip()}{unit}".strip()


def _count(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
