"""What is the unit behind a number called? All spellings of a unit have one name; an unknown unit keeps its words.

Units are not converted: 3 hours and 180 minutes are two answers.

Left out: which answers agree (`answers.py`).
"""

from __future__ import annotations

_SPELLINGS = {
    "centimeter": "cm centimeter centimetre centimeters centimetres cms",
    "millimeter": "mm millimeter millimetre millimeters millimetres",
    "meter": "meter metre meters metres mtr",
    "kilometer": "km kilometer kilometre kilometers kilometres kms",
    "inch": "in inch inches",
    "foot": "ft foot feet",
    "yard": "yd yds yard yards",
    "mile": "mi mile miles",
    "gram": "gram grams gm gms",
    "kilogram": "kg kgs kilogram kilograms",
    "milligram": "mg milligram milligrams",
    "pound": "lb lbs pound pounds",
    "ounce": "oz ounce ounces",
    "ton": "ton tons tonne tonnes",
    "liter": "liter litre liters litres",
    "milliliter": "ml milliliter millilitre milliliters millilitres",
    "second": "sec secs second seconds",
    "minute": "min mins minute minutes",
    "hour": "hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "yr yrs year years",
    "degree": "deg degs degree degrees",
    "radian": "rad rads radian radians",
    "dollar": "usd dollar dollars",
    "cent": "cent cents",
    "euro": "eur euro euros",
    "percent": "percent percents",
    "unit": "unit units",
    "miles per hour": "mph",
    "kilometers per hour": "kmh kph",
}
UNIT_OF = {spelling: unit for unit, spellings in _SPELLINGS.items() for spelling in spellings.split()}
_LETTERS = {"m": "meter", "g": "gram", "s": "second", "h": "hour", "L": "liter", "l": "liter"}
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_NO_UNIT_WORDS = (
    "or and not is are if mod modulo base when where otherwise only except but times plus minus over of than less "
    "more half third quarter about approximately with either neither no none undefined to from any all"
)
_NO_UNIT = frozenset(_NO_UNIT_WORDS.split())
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
MAX_WORDS = 4


def unit_of(words: str) -> str | None:
    """Returns the name of a unit, or of what was counted: "hrs" is hour, "square feet" foot^2, "apples" apple.

    None where the words are no unit, such as "or more".
    """
    names: list[str] = []
    power = 1
    parts = words.replace("/", " per ").split()
    if not parts or len(parts) > MAX_WORDS or any(word.lower() in _NO_UNIT for word in parts):
        return None
    for word in parts:
        if word.lower() in _POWERS:
            power = _POWERS[word.lower()]
            continue
        name = UNIT_OF.get(word.lower(), _LETTERS.get(word) or _singular(word))
        names.append(f"{name}^{power}" if power > 1 else name)
        power = 1
    return " ".join(names) if names and power == 1 else None


def _singular(word: str) -> str:
    if len(word) == 1:
        return word
    word = word.lower()
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
