"""Are two formulas the same function? Each gets a key, and formulas with equal keys are equal: an equivalence.

A number that is rational by exact arithmetic is its own key. The key of any other number is its first PLACES decimals,
computed with DIGITS digits; a number within 1e-98 of a fraction with a denominator up to a million is that fraction.
The key of a formula with variables is its values at three points that follow from the variables' names: all positive,
all negative, complex. Two functions that agree at all three points to 40 digits and more count as equal; functions that
agree on a part of the numbers only, such as x and |x|, do not.

The work is bounded: a tree has at most as many nodes as an answer has characters, and a number whose size is above 1e60
or between 1e-120 and 1e-60 raises UnreadableError (a smaller one is what rounding leaves of 0). Nothing depends on time
or on the machine: mpmath computes in whole numbers.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Hashable
from fractions import Fraction

import mpmath

from megatron_powerflow.data.expressions import Tree, UnreadableError, symbols_of

DIGITS, PLACES = 200, 100
LARGEST = 60  # the power of ten that any part of a formula may reach, up or down
MAX_BITS = 8000  # of an exact fraction's numerator and denominator
MAX_FACTORIAL = 300
MAX_DENOMINATOR = 10**6
NUM_POINTS = 3
EXACT = ("+", "-", "*", "/", "neg", "^", "!", "abs", "binom", "floor", "ceil")

_CONTEXT = mpmath.ctx_mp.MPContext()
_CONTEXT.dps = DIGITS


def fingerprint(tree: Tree) -> Hashable:
    """Returns the key of a formula: a Fraction where it is a rational number. Raises UnreadableError."""
    exact = exact_value(tree)
    if exact is not None:
        return exact
    names = symbols_of(tree)
    if not names:
        return _key_of(value_at(tree, 0), recognize=True)
    values = [_key_of(value_at(tree, point), recognize=False) for point in range(NUM_POINTS)]
    if len(set(values)) == 1:
        return _key_of(value_at(tree, 0), recognize=True)  # x - x + 1
    return ("formula", *values)


def direction(tree: Tree, *, signed: bool) -> Hashable:
    """Returns the key of a formula up to a constant factor, as for an equation; signed: up to a positive factor."""
    values = [value_at(tree, point) for point in range(NUM_POINTS)]
    scale = values[0]
    if _is_zero(scale):
        raise UnreadableError
    if signed:
        if not _is_zero(_CONTEXT.im(scale)):
            raise UnreadableError
        scale = abs(scale)
    return ("up to a factor", *(_key_of(_checked(value / scale), recognize=False) for value in values))


def exact_value(tree: Tree) -> Fraction | None:
    """Returns the rational number that + - * / and whole powers make; None where the tree holds anything else."""
    if isinstance(tree, Fraction):
        return tree
    if not isinstance(tree, tuple) or tree[0] not in EXACT:
        return None
    parts = [exact_value(part) for part in tree[1:]]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return _bounded(_exact(tree[0], known))


def _exact(operation: str, parts: list[Fraction]) -> Fraction | None:
    if operation == "^":
        return _exact_power(*parts)
    if operation == "/":
        if parts[1] == 0:
            raise UnreadableError
        return parts[0] / parts[1]
    if operation in ("!", "binom"):
        if any(part.denominator != 1 or not 0 <= part <= MAX_FACTORIAL for part in parts):
            raise UnreadableError
        numbers = [int(part) for part in parts]
        return Fraction(math.factorial(*numbers) if operation == "!" else math.comb(*numbers))
    simple: dict[str, Callable[..., int | Fraction]] = {
        **{"+": operator.add, "-": operator.sub, "*": operator.mul, "neg": operator.neg, "abs": abs},
        **{"floor": math.floor, "ceil": math.ceil},
    }
    return Fraction(simple[operation](*parts))


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        return None
    if base == 0 and exponent <= 0:
        raise UnreadableError
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(base) != 1 and base != 0 and size * abs(exponent) > MAX_BITS:
        raise UnreadableError
    if abs(base) == 1:
        return base if exponent % 2 else Fraction(1)
    return base ** int(exponent)


def _bounded(value: Fraction | None) -> Fraction | None:
    if value is not None and max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise UnreadableError
    return value


def value_at(tree: Tree, point: int):
    """Returns the value, real or complex, at one of the points (0, 1, 2). Raises UnreadableError."""
    if isinstance(tree, Fraction):
        return _checked(_CONTEXT.mpf(tree.numerator) / tree.denominator)
    if isinstance(tree, str):
        return _coordinate(tree, point)
    if tree[0] in ("floor", "ceil") and symbols_of(tree):
        raise UnreadableError  # too coarse for points to tell apart
    try:
        value = _OPERATIONS[tree[0]](*(value_at(part, point) for part in tree[1:]))
    except (ValueError, ZeroDivisionError, OverflowError, TypeError):
        raise UnreadableError from None
    return _checked(value)


def _coordinate(name: str, point: int):
    """Returns a variable's value at a point: its 38 digits follow from the name."""
    digest = hashlib.sha256(f"{name}/{point}".encode("utf-8", "surrogatepass")).digest()
    size = _CONTEXT.mpf(int.from_bytes(digest[:16], "big")) / 2**127 + _CONTEXT.mpf(1) / 4
    if point == 0:
        return size
    other = _CONTEXT.mpf(int.from_bytes(digest[16:], "big")) / 2**127 + _CONTEXT.mpf(1) / 4
    return -size if point == 1 else _CONTEXT.mpc(size, other)


def _checked(value):
    size = abs(value)
    if not _CONTEXT.isfinite(size) or size > _CONTEXT.mpf(10) ** LARGEST:
        raise UnreadableError
    if size < _CONTEXT.mpf(10) ** (-2 * LARGEST):
        return _CONTEXT.mpf(0)  # what rounding leaves of a difference of equals
    if size < _CONTEXT.mpf(10) ** -LARGEST:
        raise UnreadableError
    return value


def _is_zero(value) -> bool:
    return abs(value) < _CONTEXT.mpf(10) ** -(PLACES + 10)


def _key_of(value, *, recognize: bool) -> Hashable:
    """Returns the decimals of real and imaginary part; recognize: a Fraction where the number is rational."""
    decimals = [_decimals(part) for part in (_CONTEXT.re(value), _CONTEXT.im(value))]
    if not recognize:
        return tuple(decimals)
    parts = [_recognized(part) for part in decimals]
    return parts[0] if parts[1] == 0 and isinstance(parts[0], Fraction) else ("number", *parts)


def _decimals(part) -> int:
    return int(_CONTEXT.nint(part * 10**PLACES))


def _recognized(decimals: int) -> Fraction | int:
    exact = Fraction(decimals, 10**PLACES)
    near = exact.limit_denominator(MAX_DENOMINATOR)
    return near if abs(near - exact) * 10 ** (PLACES - 2) < 1 else decimals


def _power(base, exponent):
    if _is_zero(exponent):
        if _is_zero(base):
            raise UnreadableError
        return _CONTEXT.mpf(1)
    if _is_zero(base):
        if _CONTEXT.re(exponent) < 0:
            raise UnreadableError
        return _CONTEXT.mpf(0)
    if abs(exponent * _CONTEXT.log(base)) > LARGEST * 3:
        raise UnreadableError
    return _CONTEXT.power(base, exponent)


def _root(radicand, degree):
    if _is_zero(degree):
        raise UnreadableError
    real = _is_zero(_CONTEXT.im(radicand)) and _CONTEXT.re(radicand) < 0
    if real and _is_zero(degree - _CONTEXT.nint(_CONTEXT.re(degree))) and int(_CONTEXT.nint(degree)) % 2:
        return -_power(-radicand, 1 / degree)  # the real cube root of -8 is -2
    return _power(radicand, 1 / degree)


def _small(function: Callable, bound: int) -> Callable:
    """Returns the function for arguments up to `bound`, so that its time and result stay bounded."""

    def bounded(*arguments):
        if any(abs(argument) > bound for argument in arguments):
            raise UnreadableError
        return function(*arguments)

    return bounded


def _quotient(above, below):
    if _is_zero(below):
        raise UnreadableError
    return above / below


def _logarithm(value):
    if _is_zero(value):
        raise UnreadableError
    return _CONTEXT.log(value)


_OPERATIONS: dict[str, Callable] = {
    **{"+": operator.add, "-": operator.sub, "*": operator.mul, "/": _quotient, "neg": operator.neg},
    **{"^": _power, "root": _root, "abs": abs, "ln": _logarithm},
    # the base of a log without one is not known: it gets a fixed base that is neither e nor 10
    "log": lambda value: _logarithm(value) / _logarithm(_coordinate("the base of log", 0)),
    "lg": lambda value: _logarithm(value) / _logarithm(_CONTEXT.mpf(10)),
    **{"pi": lambda: +_CONTEXT.pi, "e": lambda: +_CONTEXT.e, "i": lambda: _CONTEXT.mpc(0, 1)},
    **{"floor": _CONTEXT.floor, "ceil": _CONTEXT.ceil},
    "!": _small(_CONTEXT.factorial, MAX_FACTORIAL // 6),
    "binom": _small(_CONTEXT.binomial, MAX_FACTORIAL // 6),
    **{
        name: _small(getattr(_CONTEXT, name), 130)
        for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "exp")
    },
    **{f"arc{name}": _small(getattr(_CONTEXT, f"a{name}"), 10**9) for name in ("sin", "cos", "tan")},
}
