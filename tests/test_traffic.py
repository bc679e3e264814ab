"""Bytes, FLOPs and collectives of optimised programs whose traffic is known.

tests/hlo holds what libtpu 0.0.42 makes of such programs for v5e:2x2, without what only says where it comes from.
between_slices is of two of them, windowed of v5e:4x4.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from d2f_jax import hlo, traffic
from d2f_jax.traffic import BETWEEN_SLICES, COLLECTIVES, COPIES, CUSTOM, ELEMENTWISE, MOVES, PRODUCTS, Work

HLO = Path(__file__).parent / "hlo"
MB = 2**20


def recorded(name: str, **options: int) -> Work:
    return traffic.work(hlo.parse((HLO / f"{name}.txt").read_text()), **options)


def compiled(function: Callable, *shapes: tuple[int, ...], **options: object) -> tuple[Work, float]:
    """On this machine; with the FLOPs that XLA counts."""
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jax.jit(function, **options).lower(*arguments).compile()
    counted = program.cost_analysis()
    return traffic.work(hlo.parse(program.as_text() or "")), (counted or {}).get("flops", 0.0)


def moved(work: Work) -> dict[str, int]:
    return {name: size for name, size in work.hbm.items() if size}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("add", {ELEMENTWISE: 3 * 64 * MB}),  # two arrays in, one out
        ("padded", {ELEMENTWISE: 3 * 4 * 104 * 100_096}),  # [100000, 100] in tiles of 8 x 128, transposed
        ("transpose", {COPIES: 2 * 128 * MB}),
        ("product", {PRODUCTS: (32 + 64) * MB, MOVES: 64 * MB}),  # a factor of 64 MB is brought to VMEM before
        ("slices", {ELEMENTWISE: 2 * 8 * MB}),  # 512 of 16384 rows, read and doubled
    ],
)
def test_bytes_of_a_tpu_program(name: str, expected: dict[str, int]) -> None:
    assert moved(recorded(name)) == expected


def test_flops_of_a_tpu_program() -> None:
    assert recorded("product").flops == 2 * 4096 * 4096 * 8192
    assert recorded("add").flops == 0


def test_fused_attention_counts_what_its_kernels_multiply() -> None:
    """The gradient of 2 x 4 heads of 2048 queries and keys, 64 wide: two products forward, five backward."""
    work, product = recorded("splash"), 2 * 8 * 2048 * 2048 * 64
    assert work.flops == 7 * product
    kernels = {flops: cycles for flops, _, cycles in work.operations if flops}
    assert kernels == {2 * product: None, 5 * product: None}  # of which the compiler tells no cycles
    assert moved(work)[CUSTOM] == 5 * 2 * 1024 * 128 * 4  # the room in which they work; all else is in VMEM


def test_instructions_of_several_lines_are_read_to_their_end() -> None:
    program = hlo.parse((HLO / "splash.txt").read_text())
    kernels = [each for each in program.computations[program.entry].values() if each.name.startswith("splash_mha")]
    assert len(kernels) == 2 and all("backend_config" in each.text for each in kernels)


@pytest.mark.parametrize(("name", "options", "rounds"), [("loop", {}, 5), ("dynamic_loop", {"unknown_trips": 7}, 7)])
def test_a_loop_counts_as_often_as_it_runs(name: str, options: dict[str, int], rounds: int) -> None:
    work = recorded(name, **options)
    assert moved(work) == {ELEMENTWISE: rounds * 2 * 256 * MB, COPIES: 2 * 256 * MB}  # what it begins with, once


def test_a_sum_that_is_passed_around_beside_products_counts_its_rounds() -> None:
    """`x.T @ y` of bfloat16 [65536, 320] and [65536, 1280] whose rows 16 chips share, and then those of the result.

    XLA makes eight rounds of it, two of which are one of its loop's.
    """
    work, part = recorded("windowed"), 2 * 20 * 1280
    assert work.flops == 2 * 65536 * 320 * 1280 // 16 and work.unknown_loops == 0
    assert work.collectives == {"collective-permute": 4 * 4 + 1}  # both ways around
    assert work.received == {"collective-permute": (4 * 4 + 1) * part}


def test_cycles_are_the_compilers_own() -> None:
    assert recorded("add").operations == {(0, 3 * 64 * MB, 641_888): 1}
    ((_, times),) = (each for each in recorded("loop").operations.items() if each[0][2] and each[1] > 1)
    assert times == 5
    text = (HLO / "add.txt").read_text()
    for not_known in (text.replace("641888", str(2**63 - 1)), text.partition(", backend_config")[0] + "\n}\n"):
        assert traffic.work(hlo.parse(not_known)).operations == {(0, 3 * 64 * MB, None): 1}
    assert recorded("product").operations == {(2**38, 96 * MB, 2_150_056): 1, (0, 64 * MB, 0): 1}


def test_a_loop_whose_length_is_not_told_is_named() -> None:
    assert recorded("dynamic_loop").unknown_loops == 1 and recorded("loop").unknown_loops == 0


def test_a_gather_in_parts_beside_products_counts_once() -> None:
    """`tanh(a @ w1) @ w2` of bfloat16 [2048, 2048] on each chip, which holds a quarter of both factors."""
    work = recorded("gathers")
    assert work.collectives == {"all-gather": 2}
    assert work.received == {"all-gather": 2 * 3 * 2 * MB}
    assert work.flops == 2 * 2 * 2048**3
    assert moved(work) == {
        PRODUCTS: 8 * MB,  # the result; all else is in VMEM
        MOVES: 8 * MB + 2 * MB,  # a, and this chip's part of w2
        COLLECTIVES: 2 * MB,  # this chip's part of w1
    }


def test_a_sum_of_which_each_keeps_a_part_is_no_whole_all_reduce() -> None:
    work = recorded("scatter")
    assert work.collectives == {"reduce-scatter": 1} and work.received == {"reduce-scatter": 6 * MB}
    assert work.hbm[COLLECTIVES] == 2 * MB  # the part that is kept; what was summed is in VMEM


def test_what_slices_exchange_is_apart() -> None:
    """A gradient [1024, 1024] is summed in each slice, a quarter on each of four chips; over both; and gathered."""
    work, part = recorded("between_slices"), 1 * MB
    assert work.received == {"reduce-scatter": 3 * part, BETWEEN_SLICES: part, "all-gather": 3 * part}
    assert work.hbm[COLLECTIVES] == 4 * part  # it is left by one, read by the next, twice; all else is in VMEM


@pytest.mark.parametrize(
    ("kind", "results", "bytes_moved"),
    [
        ("all-reduce", "f32[100]{0}, f32[50]{0}", 2 * 600),
        ("all-gather", "(f32[100]{0}, f32[50]{0}), (f32[800]{0}, f32[400]{0})", 9 * 600),
    ],
)
def test_a_collective_beside_other_work_reads_and_writes(kind: str, results: str, bytes_moved: int) -> None:
    text = f"""HloModule m, num_partitions=8

ENTRY %main (a: f32[100], b: f32[50]) -> f32[] {{
  %a = f32[100]{{0}} parameter(0)
  %b = f32[50]{{0}} parameter(1)
  ROOT %r = ({results}) {kind}-start(%a, %b), channel_id=1, replica_groups={{}}, dimensions={{0}}
}}
"""
    work = traffic.work(hlo.parse(text))
    assert moved(work) == {COLLECTIVES: bytes_moved} and work.collectives == {kind: 1}


@pytest.mark.parametrize(
    ("groups", "kind", "received"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", "all-gather", 3 * 400),
        ("replica_groups=[4,2]<=[8]", "all-gather", 400),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", "all-gather", 3 * 400),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}", "all-gather", 3 * 400),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", "all-gather", 400),
        ("replica_groups={}", "all-gather", 7 * 400),
        ("replica_groups={{0,1,2,3}}", "all-reduce", 2 * 300),
        ("replica_groups={{0,1,2,3}}", "reduce-scatter", 300),
        ("replica_groups={{0,1,2,3}}", "all-to-all", 300),
        ("source_target_pairs={{0,1},{1,0}}", "collective-permute", 400),
    ],
)
def test_what_a_device_receives(groups: str, kind: str, received: int) -> None:
    text = f"""HloModule m, num_partitions=8

ENTRY %main (a: f32[100]) -> f32[100] {{
  %a = f32[100]{{0:T(128)}} parameter(0)
  ROOT %r = f32[100]{{0:T(128)}} {kind}(%a), channel_id=1, {groups}, dimensions={{0}}
}}
"""
    assert traffic.work(hlo.parse(text)).received == {kind: received}


def conv(x: jax.Array, kernel: jax.Array, **options: object) -> jax.Array:
    dimensions = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    return jax.lax.conv_general_dilated(x, kernel, **{"window_strides": (1, 1), **dimensions, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "SAME"},
        {"padding": ((0, 1), (0, 1)), "window_strides": (2, 2)},
        {"padding": ((1, 2), (2, 1)), "lhs_dilation": (2, 3), "rhs_dilation": (1, 2)},
    ],
)
def test_flops_of_convolutions_and_their_gradients_are_those_of_xla(options: dict[str, object]) -> None:
    function, shapes = functools.partial(conv, **options), ((2, 9, 11, 8), (3, 3, 8, 16))
    out = jax.eval_shape(function, *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).shape
    work, counted = compiled(lambda x, kernel, grad: jax.vjp(function, x, kernel)[1](grad), *shapes, out)
    assert work.flops == counted > 0


def test_flops_of_products_with_a_batch() -> None:
    work, _ = compiled(lambda a, b: jnp.einsum("bnd,bmd->bnm", a, b), (3, 5, 7), (3, 6, 7))
    assert work.flops == 2 * 3 * 5 * 6 * 7
    assert moved(work) == {PRODUCTS: 4 * 3 * (5 * 7 + 6 * 7 + 5 * 6)}


def test_flops_of_products_whose_batch_is_written_as_a_window() -> None:
    """As TPUs have them: [77, 256] times each of four [256, 32]; and with 4096 of both, in no time."""
    text = """HloModule m

ENTRY %main (a: bf16[77,256,1], b: bf16[4,32,256]) -> bf16[77,4,32] {
  %a = bf16[77,256,1]{1,0,2} parameter(0)
  %b = bf16[4,32,256]{2,1,0} parameter(1)
  ROOT %r = bf16[77,4,32]{0,2,1} convolution(%a, %b), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_0oi->b0f
}
"""
    assert traffic.work(hlo.parse(text)).flops == 2 * 77 * 256 * 4 * 32
    many = text.replace("256,1]", "256,4096]").replace("[4,", "[4096,").replace(",4,", ",4096,")
    window = "size=4096 stride=4095 pad=4095_4095 lhs_dilate=4096 rhs_reversal=1"
    many = many.replace("size=4 pad=3_3 rhs_reversal=1", window)
    assert traffic.work(hlo.parse(many)).flops == 2 * 77 * 256 * 4096 * 32


def test_a_scan_reads_and_writes_its_own_rows_only() -> None:
    work, _ = compiled(lambda a, rows: jax.lax.scan(lambda a, row: (a, a * row), a, rows)[1], (256,), (16, 256))
    row, zeros = 4 * 256, 16 * 4 * 256  # what the rows are put into
    assert moved(work) == {ELEMENTWISE: 16 * 3 * row + zeros}  # of the carried one, its own, and the result's


def test_an_update_in_place_moves_what_it_puts() -> None:
    update = functools.partial(jax.lax.dynamic_update_slice, start_indices=(3, 0))
    work, _ = compiled(update, (64, 256), (2, 256), donate_argnums=0)
    assert sum(work.hbm.values()) == 2 * 4 * 2 * 256


def test_a_fusion_that_writes_over_what_it_read_moves_both() -> None:
    """And its results may stand in tuples within a tuple."""
    text = """HloModule m

%twice (p: f32[100], q: f32[100]) -> (f32[100], (f32[100])) {
  %p = f32[100]{0} parameter(0)
  %q = f32[100]{0} parameter(1)
  %c = f32[100]{0} negate(%p)
  %d = f32[100]{0} negate(%q)
  %e = (f32[100]{0}) tuple(%d)
  ROOT %t = (f32[100]{0}, (f32[100]{0})) tuple(%c, %e)
}

ENTRY %main (a: f32[100], b: f32[100]) -> (f32[100], (f32[100])) {
  %a = f32[100]{0} parameter(0)
  %b = f32[100]{0} parameter(1)
  ROOT %r = (f32[100]{0}, (f32[100]{0})) fusion(%a, %b), output_to_operand_aliasing={{0}: (0, {})}, calls=%twice
}
"""
    assert moved(traffic.work(hlo.parse(text))) == {ELEMENTWISE: 4 * 400}


def test_every_branch_of_a_conditional_counts() -> None:
    text = """HloModule m

%once (p: f32[100]) -> f32[100] {
  %p = f32[100]{0} parameter(0)
  ROOT %c = f32[100]{0} negate(%p)
}

%same (q: f32[100]) -> f32[100] {
  %q = f32[100]{0} parameter(0)
  ROOT %d = f32[100]{0} copy(%q)
}

ENTRY %main (i: s32[], a: f32[100]) -> f32[100] {
  %i = s32[] parameter(0)
  %a = f32[100]{0} parameter(1)
  ROOT %r = f32[100]{0} conditional(%i, %a, %a), branch_computations={%once, %same}, control-predecessors={%a}
}
"""
    assert moved(traffic.work(hlo.parse(text))) == {ELEMENTWISE: 800, COPIES: 800}
    of_two = text.replace("branch_computations={%once, %same}", "true_computation=%once, false_computation=%same")
    assert moved(traffic.work(hlo.parse(of_two))) == {ELEMENTWISE: 800, COPIES: 800}
