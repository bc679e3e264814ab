"""Operations of a program, counted from what was traced: the same on every device, and before anything is optimised."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from d2f_jax.models import devices

_EACH = frozenset(
    {
        "abs",
        "add",
        "add_any",
        "cos",
        "cumsum",
        "div",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "expm1",
        "integer_pow",
        "log",
        "log1p",
        "logistic",
    }
    | {"max", "min", "mul", "neg", "pow", "rsqrt", "sin", "sqrt", "square", "sub", "tanh"}
)
"""Primitives that count once for each element of their result."""


def count(jitted: Any, *arguments: Any) -> int:
    """Floating-point operations of a jitted function, over all devices.

    A multiplication and its addition in products and convolutions are two, with nothing for zeros around a picture or
    between its pixels; every other element that is computed, or added up, is one. Loops count as often as they are run,
    where that is known, and of branches the largest. A fused kernel would not be seen, so that none is chosen here.
    """
    with devices.plain():
        return _all(jitted.trace(*arguments).jaxpr.jaxpr)


def _all(jaxpr: Any, wanted: Sequence[bool] | None = None) -> int:
    """Of the equations whose results are read, for those of its results that are `wanted`: XLA drops the others."""
    outs = jaxpr.outvars if wanted is None else itertools.compress(jaxpr.outvars, wanted)
    total, read = 0, {id(x) for x in outs}
    for equation in reversed(jaxpr.eqns):
        wanted = [id(x) in read for x in equation.outvars]
        if any(wanted):
            total += _one(equation, wanted)
            read |= {id(x) for x in equation.invars}
    return total


def _one(equation: Any, wanted: Sequence[bool]) -> int:
    name, given, params = equation.primitive.name, equation.invars, equation.params
    bodies = _jaxprs(list(params.values()))
    # A loop's results are also what it goes on with.
    dropped = wanted if name not in ("scan", "while") else None
    inside = [_all(body, dropped if len(body.outvars) == len(wanted) else None) for body in bodies]
    match name:
        case "scan":
            return params["length"] * sum(inside)
        case "cond":
            return max(inside)
        case "shard_map":
            return params["mesh"].size * sum(inside)
        case "dot_general":
            contracted = params["dimension_numbers"][0][0]
            return 2 * equation.outvars[0].aval.size * math.prod(given[0].aval.shape[i] for i in contracted)
        case "conv_general_dilated":
            return _convolution(equation)
    if inside:
        return sum(inside)
    if not equation.outvars or not jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating):
        return 0
    if name.startswith("reduce_"):
        return 0 if name == "reduce_precision" else given[0].aval.size
    return equation.outvars[0].aval.size if name in _EACH else 0


def _jaxprs(values: list[Any]) -> list[Any]:
    """Those among an equation's parameters, as a loop has one and branches several."""
    flat = [x for value in values for x in (value if isinstance(value, list | tuple) else [value])]
    return [jaxpr for value in flat if hasattr(jaxpr := getattr(value, "jaxpr", value), "eqns")]


def _convolution(equation: Any) -> int:
    picture, kernel = (x.aval.shape for x in equation.invars)
    result, params = equation.outvars[0].aval.shape, equation.params
    of_picture, of_kernel, of_result = params["dimension_numbers"]
    pairs = result[of_result[0]] * result[of_result[1]] * kernel[of_kernel[1]]
    for axis, (stride, (low, _), apart, spread) in enumerate(
        zip(params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"], strict=True)
    ):
        # Where the kernel's elements fall, for each of the result's: on a pixel, or on the zeros around and between.
        falls = stride * np.arange(result[of_result[2 + axis]])[:, None] - low
        falls = falls + spread * np.arange(kernel[of_kernel[2 + axis]])
        there = (falls >= 0) & (falls <= apart * (picture[of_picture[2 + axis]] - 1)) & (falls % apart == 0)
        pairs *= int(there.sum())
    return 2 * pairs
