"""Which symbols is an answer made of? TeX, Unicode and plain writing in, one list of tokens out.

A token is a text of one of these kinds:

    12.5 3e-05     a number                     x \\alpha            a symbol
    \\frac \\sin      a command, one spelling each ( ) [ ] | + ^ =     a character that means something
    \\{ \\}          the braces of a set          { }                  TeX's braces
    "hours"        words, in double quotes, in lower case but for single letters and units

What changes only the look is dropped: dollar signs, \\left and \\right, spaces, fonts, \\displaystyle.

Left out: structure (`answer_reading.py`), arithmetic (`expressions.py`).
"""

from __future__ import annotations

import re
import unicodedata

from megatron_powerflow.data.units import UNIT_OF

MAX_CHARACTERS = 400  # of an answer; a longer one is compared as text


def _word_set(words: str) -> frozenset[str]:
    return frozenset(words.split())


FUNCTIONS = _word_set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp")
SYMBOLS = _word_set(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi "
    "omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell hbar"
)
_SAME = {
    **{"dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "choose": "choose"},
    **{"le": "leq", "leqslant": "leq", "ge": "geq", "geqslant": "geq", "ne": "neq", "lt": "<", "gt": ">"},
    **{"times": "*", "cdot": "*", "ast": "*", "div": "/", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|"},
    **{"lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]", "varnothing": "emptyset", "degree": "circ"},
    **{"vartheta": "theta", "varphi": "phi", "varepsilon": "epsilon", "arcsen": "arcsin", "tg": "tan", "ctg": "cot"},
    **{"lor": '"or"', "vee": '"or"', "land": '"and"', "wedge": '"and"', "simeq": "approx", "sim": "approx"},
    **{"dots": "ldots", "cdots": "ldots", "colon": ":", "backslash": "setminus", "infin": "infty", "R": "RR"},
    **{"euro": '"euro"', "pounds": '"pound"', "percent": "%", "lparen": "(", "rparen": ")"},
    **{"langle": "(", "rangle": ")", "C": "CC", "Z": "ZZ"},
    **{"leftarrow": "gets", "rightarrow": "to", "implies": "Rightarrow", "euler": "e"},
}
_GONE = _word_set(
    "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr displaystyle textstyle "
    "limits quad qquad hspace rm bf it sf tt nolimits hfill boldsymbol mathbf mathit bm mathsf mathnormal boxed "
    "fbox phantom thinspace space nobreakspace bold ensuremath color scriptstyle"
)
_WORDS = _word_set("text textbf textit textrm textsf mathrm mbox operatorname hbox textnormal mathtt texttt")
_UNICODE = {
    **{"−": "-", "–": "-", "‐": "-", "﹣": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "∗": "*", "÷": "/", "⁄": "/"},
    **{"π": "\\pi ", "∞": "\\infty ", "≤": "\\leq ", "≥": "\\geq ", "≠": "\\neq ", "±": "\\pm ", "∓": "\\mp "},
    **{"√": "\\sqrt ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ", "∅": "\\emptyset ", "°": "^\\circ "},
    **{"º": "^\\circ "},
    **{"ℝ": "\\RR ", "≈": "\\approx ", "∠": "\\angle ", "△": "\\triangle ", "€": '\\euro ', "£": "\\pounds "},
    **{"“": '"', "”": '"', "’": "'", "′": "'", "…": "\\ldots ", "∨": "\\lor ", "∧": "\\land ", "\u00a0": "~"},
    **{"½": "\\frac{1}{2}", "⅓": "\\frac{1}{3}", "⅔": "\\frac{2}{3}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}"},
    **{"⅕": "\\frac{1}{5}", "⅛": "\\frac{1}{8}", "⅜": "\\frac{3}{8}", "⅝": "\\frac{5}{8}", "⅞": "\\frac{7}{8}"},
    **{"％": "\\%", "\u2009": "\\,", "\u202f": "\\,", "，": ",", "：": ":", "（": "(", "）": ")", "℃": "^\\circ C"},
    **{"α": "\\alpha ", "β": "\\beta ", "γ": "\\gamma ", "δ": "\\delta ", "ε": "\\epsilon "},
    **{"θ": "\\theta ", "λ": "\\lambda ", "μ": "\\mu ", "ρ": "\\rho ", "σ": "\\sigma "},
    **{"τ": "\\tau ", "φ": "\\phi ", "χ": "\\chi ", "ψ": "\\psi ", "ω": "\\omega "},
}  # fmt: skip
_SUPERSCRIPTS = {ord(c): d for c, d in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ", "0123456789-+n", strict=True)}
_SUBSCRIPTS = {ord(c): d for c, d in zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True)}

_GAP = r"(?:,\\!|\\[,;:! ]|~|\{,\}|\\text\{ \})"
_GROUPED = re.compile(rf"(?<![\d.,])(\d{{1,3}}(?:(?:{_GAP}| )\d{{3}})+)(?![\d])")
_COMMAS = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?!,?\d)")
_MIXED = re.compile(r"(?<![\d.,/])(\d{1,40}) +(\d{1,40})/(\d{1,40})(?![\d.])")  # 1 1/2
_ESCAPED_TWICE = re.compile(r"\\\\([A-Za-z]+)?")
_PIECE = re.compile(
    r"(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,4}(?![\d.]))?)"
    r"|(?P<command>\\(?:[A-Za-z]+|.))|(?P<word>[A-Za-z]+)|(?P<space>\s+)|(?P<other>.)",
    re.DOTALL,
)
_PLAIN_WORDS = _word_set("or and yes no true false none if not mod odd even inf nan")


def tokenize(answer: str) -> list[str] | None:
    """Returns the tokens of an answer; None where it is too long or its braces do not match.

    The time is linear in the answer's length.
    """
    if len(answer) > MAX_CHARACTERS:
        return None
    return _tokens(_normalized(answer))


def _normalized(text: str) -> str:
    """Writes Unicode as TeX, digits as ASCII, and groups of three digits together."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ⁿ]+", lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda match: f"_{{{match[0].translate(_SUBSCRIPTS)}}}", text)
    text = "".join(_UNICODE.get(c, c) for c in text)
    text = "".join(
        str(unicodedata.decimal(c)) if c.isdecimal() else unicodedata.normalize("NFKC", c) if c > "\x7f" else c
        for c in text
    )
    text = _ESCAPED_TWICE.sub(lambda match: f"\\{match[1]}" if _is_command(match[1]) else match[0], text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _GROUPED.sub(lambda match: re.sub(rf"{_GAP}| ", "", match[1]), text)
    if not re.match(r"[\s$]*(?:\\left)?\\?[(\[{]", text):  # in brackets a comma separates entries: (1,234)
        text = _COMMAS.sub(lambda match: match[1].replace(",", ""), text)
    return text


def _is_command(name: str | None) -> bool:
    return name is not None and (
        name in _SAME or name in _GONE or name in _WORDS or name in SYMBOLS or name in FUNCTIONS or name in _OTHERS
    )


_OTHERS = _word_set("frac sqrt pi binom begin end infty pm mp cup cap in leq geq neq circ overline")


def _tokens(text: str) -> list[str] | None:
    tokens: list[str] = []
    position = 0
    while position < len(text):
        piece = _PIECE.match(text, position)
        assert piece is not None, "its last group takes any character"
        position, written = piece.end(), piece[0]
        if piece["number"]:
            tokens.append(written)
        elif piece["word"]:
            tokens += _word(written)
        elif piece["command"]:
            behind = _command(text, position, written[1:], tokens)
            if behind is None:
                return None
            position = behind
        elif piece["other"] and written not in "$~":
            tokens.append(written)
    return _joined(tokens)


def _word(word: str) -> list[str]:
    """Returns the tokens of a run of letters: one for each letter, or one for a word of plain writing."""
    if word.lower() in _PLAIN_WORDS:
        return [f'"{word.lower()}"']
    if word in FUNCTIONS or word in ("sqrt", "pi", "infty"):
        return [f"\\{word}"]
    if word == "infinity":
        return ["\\infty"]
    if len(word) > 1 and word.lower() in UNIT_OF:
        return [f'"{word}"']
    if (len(word) > 3 and not word.isupper()) or re.fullmatch("[A-Z][a-z]{2,}", word):
        return [f'"{word.lower()}"']
    return list(word)


def _command(text: str, position: int, name: str, tokens: list[str]) -> int | None:
    """Appends what `\\name` means to `tokens`; returns the position behind it, None where its braces do not match."""
    if name in ("left", "right") and text.startswith(".", position):
        return position + 1
    if name in _WORDS:
        return _words(text, position, tokens)
    if name in ("mathbb", "mathcal", "hspace", "color", "phantom", "vspace") and (
        group := re.compile(r"\s*\{([^{}]*)\}").match(text, position)
    ):
        if name in ("mathbb", "mathcal"):
            tokens.append(f"\\{group[1] * 2 if name == 'mathbb' else group[1]}")
        return group.end()
    if name in ("begin", "end") and (group := re.compile(r"\{([a-z]+)\*?\}").match(text, position)):
        position = group.end()
        if name == "begin" and (columns := re.compile(r"\{[lcr| ]*\}").match(text, position)):
            position = columns.end()
        tokens.append(f"\\{name}:{group[1]}")
        return position
    if name in _GONE or name in (",", ";", ":", "!", " ", "(", ")", "[", "]", "\n", "/"):
        return position
    name = _SAME.get(name, name)
    if name in ("$", "%", '"or"', '"and"', '"euro"', '"pound"', "<", ">", "*", "/", "|", "[", "]", "(", ")", ":", "e"):
        tokens.append('"dollar"' if name == "$" else name)
    elif name in ("#", "&", "_"):
        return None
    else:
        tokens.append(name if name.startswith("\\") and len(name) == 2 else f"\\{name}")
    return position


def _words(text: str, position: int, tokens: list[str]) -> int | None:
    """Appends the argument of \\text and its like: words, a function's name, or mathematics if it holds digits or TeX.

    Returns the position behind it; None where its braces do not match.
    """
    begin = text.find("{", position)
    if begin < 0 or text[position:begin].strip():
        return position
    depth = 0
    for end in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            break
    else:
        return None
    inner = text[begin + 1 : end].strip(" ~")
    if inner in FUNCTIONS and inner not in UNIT_OF:
        tokens.append(f"\\{inner}")
    elif inner in ("e", "i") or (inner.isupper() and inner.isalpha() and not tokens and len(inner) > 1):
        tokens += _word(inner)
    elif re.fullmatch(r"[A-Za-z][A-Za-z .'-]*", inner):
        tokens.append(f'"{_as_words(inner)}"')
    elif inner:
        inside = _tokens(inner)
        if inside is None:
            return None
        tokens += inside
    return end + 1


def _as_words(text: str) -> str:
    words = text.strip(" .").split()
    return " ".join(word if len(word) == 1 or word.lower() in UNIT_OF else word.lower() for word in words)


def _joined(tokens: list[str]) -> list[str]:
    """Joins words that follow each other to one token, except `or` and `and`, which separate."""
    joined: list[str] = []
    for token in tokens:
        both = joined and token[0] == '"' == joined[-1][0] and len(token) > 1 and len(joined[-1]) > 1
        if both and not {token, joined[-1]} & {'"or"', '"and"', '"dollar"'}:
            joined[-1] = f"{joined[-1][:-1]} {token[1:]}"
        else:
            joined.append(token)
    return joined
