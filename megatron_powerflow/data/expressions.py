"""Which number or function is a formula of an answer? Tokens in, a tree out.

    tree := Fraction | "symbol" | ("pi",) | (operation, tree, ...)

The parser is ours because an answer may be hostile: published LaTeX parsers compute while they read (9^{9^{9}} does not
end), read half an answer and drop the rest, and stop at \\frac12. Here the work is bounded by MAX_CHARACTERS of text,
MAX_DEPTH levels and MAX_STEPS. Everything else raises UnreadableError, and the answer is compared as text.

Left out: sets, intervals, equations, units (`answer_reading.py`); values and keys (`fingerprints.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TypeGuard

from megatron_powerflow.data.answer_tokens import FUNCTIONS, SYMBOLS

MAX_DEPTH = 24
MAX_DIGITS = 400
MAX_STEPS = 400  # of the parser, since sums, products and powers are trees as deep as they are long
GAMMA_STEPS = 60  # the steps that a factorial or binomial of variables costs, where a sum costs 1

Tree = Fraction | str | tuple


class UnreadableError(Exception):
    """Says that tokens are no formula which this package computes. The error never leaves `data/`."""


def parse_expression(tokens: Sequence[str]) -> Tree:
    """Returns the tree of all of the tokens. Raises UnreadableError."""
    parser = _Parser(tokens)
    tree = parser.sum()
    if parser.next() is not None:
        raise UnreadableError
    return tree


def symbols_of(tree: Tree) -> frozenset[str]:
    """Returns the names of the variables in a tree."""
    if isinstance(tree, str):
        return frozenset([tree])
    return frozenset().union(*map(symbols_of, tree[1:])) if isinstance(tree, tuple) else frozenset()


def with_value(tree: Tree, name: str, value: Fraction) -> Tree:
    """Returns the tree with a number in place of a variable."""
    if tree == name:
        return value
    return (tree[0], *(with_value(part, name, value) for part in tree[1:])) if isinstance(tree, tuple) else tree


def to_number(token: str) -> Fraction:
    """Returns the value of a token that begins with a digit or a point. Raises UnreadableError for 1e999."""
    mantissa, _, exponent = token.lower().partition("e")
    if len(mantissa) > MAX_DIGITS or abs(int(exponent or 0)) > MAX_DIGITS:
        raise UnreadableError
    return Fraction(mantissa.rstrip(".") or "0") * Fraction(10) ** int(exponent or 0)


def is_number(token: str | None) -> TypeGuard[str]:
    """Whether the token is a number."""
    return token is not None and (token[0].isdigit() or (token[0] == "." and len(token) > 1))


def is_symbol(token: str | None) -> TypeGuard[str]:
    """Whether the token is a letter or a TeX symbol such as \\alpha."""
    return token is not None and ((len(token) == 1 and token.isalpha()) or token[1:] in SYMBOLS)


class _Parser:
    """Parses by recursive descent: each method reads one level of precedence and returns its tree."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens, self.position, self.depth, self.bars, self.operations = list(tokens), 0, 0, 0, 0

    def next(self) -> str | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def take(self, *expected: str) -> str | None:
        """Takes the next token if it is one of these; else returns None."""
        token = self.next()
        if token in expected:
            self.position += 1
            return token
        return None

    def need(self, expected: str) -> None:
        if self.take(expected) is None:
            raise UnreadableError

    def count(self, steps: int = 1) -> None:
        self.operations += steps
        if self.operations > MAX_STEPS:
            raise UnreadableError

    def sum(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadableError
        tree = self.product()
        while sign := self.take("+", "-"):
            self.count()
            tree = ("+" if sign == "+" else "-", tree, self.product())
        self.depth -= 1
        return tree

    def product(self) -> Tree:
        tree = self.signed()
        while True:
            self.count()
            if sign := self.take("*", "/"):
                tree = (sign, tree, self.signed())
            elif self.starts_a_factor():
                tree = ("*", tree, self.power())
            else:
                return tree

    def starts_a_factor(self) -> bool:
        """Whether a factor follows without a sign. A number is none: 2 3 and x2 are unclear."""
        token = self.next()
        if token is None or is_number(token):
            return False
        if token == "|":
            return self.bars == 0
        return is_symbol(token) or token in _OPENERS or token[1:] in FUNCTIONS

    def signed(self) -> Tree:
        if sign := self.take("+", "-"):
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise UnreadableError
            tree = self.signed()
            self.depth -= 1
            return ("neg", tree) if sign == "-" else tree
        return self.power()

    def power(self) -> Tree:
        tree = self.primary()
        while True:
            self.count()
            if self.take("!"):
                self.count(GAMMA_STEPS)
                tree = ("!", tree)
            elif self.take("%"):
                raise UnreadableError  # 50% of something: a percentage is a unit at the end, or nothing
            elif self.next() == "^":
                self.position += 1
                if self.take("\\circ"):
                    tree = ("*", tree, ("/", ("pi",), Fraction(180)))
                elif self.tokens[self.position : self.position + 3] == ["{", "\\circ", "}"]:
                    self.position += 3
                    tree = ("*", tree, ("/", ("pi",), Fraction(180)))
                else:
                    tree = ("^", tree, self.argument(whole=True))
                    if self.next() == "^":
                        raise UnreadableError  # a^b^c
            else:
                return tree

    def argument(self, *, whole: bool = False) -> Tree:
        """Reads a TeX argument. whole: all digits without braces belong to it (x^12), not only the first (\\frac12)."""
        if self.take("{"):
            tree = self.sum()
            self.need("}")
            return tree
        token = self.next()
        if is_number(token) and not whole and token.isdigit() and len(token) > 1:
            self.tokens[self.position] = token[1:]
            return Fraction(token[0])
        if whole and self.take("-"):
            return ("neg", self.argument(whole=True))
        if (
            is_number(token)
            or is_symbol(token)
            or (token is not None and token in ("\\pi", "\\frac", "\\sqrt", "e", "i"))
        ):
            return self.primary()
        raise UnreadableError

    def primary(self) -> Tree:
        token = self.next()
        if token is None:
            raise UnreadableError
        self.position += 1
        if is_number(token):
            return self.number(token)
        if token == "|":
            self.bars += 1
            tree = self.sum()
            self.need("|")
            self.bars -= 1
            return ("abs", tree)
        if token in _CLOSER:
            bars, self.bars = self.bars, 0
            tree = self.sum()
            self.need(_CLOSER[token])
            self.bars = bars
            return (_OPERATION[token], tree) if token in _OPERATION else tree
        if token in ("\\frac", "\\binom"):
            self.count(GAMMA_STEPS if token == "\\binom" else 1)
            return ("/" if token == "\\frac" else "binom", self.argument(), self.argument())
        if token == "\\sqrt":
            return self.root()
        if token == "\\pi":
            return ("pi",)
        if token[1:] in FUNCTIONS:
            return self.function(token[1:])
        if is_symbol(token):
            return self.symbol(token)
        raise UnreadableError

    def number(self, token: str) -> Tree:
        """Reads a number; 1\\frac12 is one and a half; 0.1\\overline{6} repeats."""
        value = to_number(token)
        if self.tokens[self.position : self.position + 2] == ["\\overline", "{"] and "." in token:
            repeats, closing = [*self.tokens[self.position + 2 : self.position + 4], "", ""][:2]
            if not repeats.isdigit() or closing != "}":
                raise UnreadableError
            self.position += 4
            num_decimals = len(token.partition(".")[2])
            return value + Fraction(int(repeats), 10**num_decimals * (10 ** len(repeats) - 1))
        if token.isdigit() and self.next() == "\\frac":
            before = self.position
            self.position += 1
            above, below = self.argument(), self.argument()
            if isinstance(above, Fraction) and isinstance(below, Fraction) and 0 < above < below:
                return value + above / below
            self.position = before
            if isinstance(above, Fraction) and isinstance(below, Fraction):
                raise UnreadableError  # 2\frac{7}{3}: neither of the two readings is safe
        return value

    def root(self) -> Tree:
        if self.take("["):
            degree = self.sum()
            self.need("]")
            return ("root", self.argument(whole=True), degree)
        if self.take("("):  # plain writing: sqrt(2)
            tree = self.sum()
            self.need(")")
            return ("root", tree, Fraction(2))
        return ("root", self.argument(whole=True), Fraction(2))

    def function(self, name: str) -> Tree:
        """Reads sin x, sin^2 x, sin^{-1} x, log_2 8; the argument is in brackets or the product that follows."""
        base = self.argument(whole=True) if name in ("log",) and self.take("_") else None
        exponent = self.argument(whole=True) if self.take("^") else None
        if self.next() in ("(", "{", "|", "["):
            argument = self.primary()
        else:
            argument = self.power()
            while (
                (token := self.next()) is not None
                and self.starts_a_factor()
                and token not in ("(", "[")
                and token[1:] not in FUNCTIONS
            ):
                argument = ("*", argument, self.power())
        if exponent == ("neg", Fraction(1)) and f"arc{name}" in FUNCTIONS:
            return (f"arc{name}", argument)
        if isinstance(exponent, tuple):
            raise UnreadableError
        tree = (name, argument) if base is None else ("/", ("ln", argument), ("ln", base))
        return tree if exponent is None else ("^", tree, exponent)

    def symbol(self, token: str) -> Tree:
        name = token
        if self.take("_"):
            name += f"_{self.subscript()}"
        while self.take("'"):
            name += "'"
        if name in ("e", "i"):
            return (name,)
        if name[0] in "fghFG" and self.next() == "(":
            raise UnreadableError  # an unknown function: f(2x) is not 2 f x
        return name

    def subscript(self) -> str:
        if not self.take("{"):
            token = self.next()
            self.position += 1
            if token is None or not (is_number(token) or is_symbol(token)):
                raise UnreadableError
            return token
        inside = []
        while (token := self.next()) != "}":
            if token is None or token == "{":
                raise UnreadableError
            inside.append(token.strip('"'))
            self.position += 1
        self.position += 1
        return " ".join(inside)


_CLOSER = {"(": ")", "{": "}", "[": "]", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}
_OPERATION = {"\\lfloor": "floor", "\\lceil": "ceil"}
_OPENERS = frozenset(["(", "{", "[", "\\frac", "\\sqrt", "\\binom", "\\pi", "\\lfloor", "\\lceil"])
