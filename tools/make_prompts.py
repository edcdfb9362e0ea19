#!/usr/bin/env python3
"""Which prompts are shipped? Writes them, the same each time: mathematics with answers that are computed, and openings.

    python tools/make_prompts.py --out megatron_powerflow/recipes

reasoning.jsonl and creative.jsonl to train on, reasoning_held_out.jsonl and creative_held_out.jsonl to evaluate on: id,
task, question and, for reasoning, answer. No question stands in two of them. All of it is this project's own writing.

Left out: prompts worth publishing results on; `powerflow prepare` makes those of published files.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product
from pathlib import Path

SEED = 2603
NUM_REASONING, NUM_CREATIVE, NUM_HELD_OUT = 360, 320, 96
NAMES = [
    "Ada",
    "Ben",
    "Chidi",
    "Dana",
    "Emeka",
    "Farah",
    "Goran",
    "Hana",
    "Ivo",
    "Jun",
    "Kofi",
    "Lena",
    "Mira",
    "Noor",
    "Otto",
    "Priya",
    "Quinn",
    "Rosa",
    "Sami",
    "Tova",
]
THINGS = ["apples", "pencils", "marbles", "stamps", "shells", "tickets", "cards", "beads", "coins", "stickers"]


def fraction(value: Fraction) -> str:
    """As an answer is written in a box."""
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return f"{sign}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def shares(r: random.Random) -> tuple[str, str]:
    name, other, things = *r.sample(NAMES, 2), r.choice(THINGS)
    a, b = r.randint(12, 60), r.randint(3, 11)
    return f"{name} has {a} {things} and gives {b} to {other}. How many {things} does {name} have left?", str(a - b)


def boxes(r: random.Random) -> tuple[str, str]:
    things, n, m, k = r.choice(THINGS), r.randint(4, 12), r.randint(6, 18), r.randint(2, 9)
    text = f"A shop packs {things} into {n} boxes of {m} and has {k} left over. How many {things} are there in all?"
    return text, str(n * m + k)


def percent(r: random.Random) -> tuple[str, str]:
    price, off = r.randrange(40, 400, 20), r.choice([5, 10, 15, 20, 25, 40])
    return f"A coat costs ${price}. It is reduced by {off}%. What is the new price in dollars?", fraction(
        Fraction(price * (100 - off), 100)
    )


def back_percent(r: random.Random) -> tuple[str, str]:
    old, up = r.randrange(40, 300, 20), r.choice([10, 20, 25, 50])
    new = Fraction(old * (100 + up), 100)
    return f"After a rise of {up}% a rent is ${fraction(new)}. What was it before, in dollars?", str(old)


def linear(r: random.Random) -> tuple[str, str]:
    x, a, b = r.randint(-9, 9), r.randint(2, 9), r.randint(-20, 20)
    return f"Solve for x: {a}x {b:+d} = {a * x + b}.".replace("+", "+ ").replace(" -", " - "), str(x)


def two_unknowns(r: random.Random) -> tuple[str, str]:
    x, y = r.randint(-6, 9), r.randint(-6, 9)
    return f"If x + y = {x + y} and x - y = {x - y}, what is the product xy?", str(x * y)


def remainder(r: random.Random) -> tuple[str, str]:
    n, m = r.randint(200, 2000), r.choice([7, 9, 11, 13])
    return f"What is the remainder when {n} is divided by {m}?", str(n % m)


def power_remainder(r: random.Random) -> tuple[str, str]:
    a, n, m = r.randint(2, 9), r.randint(5, 40), r.choice([5, 7, 9, 10, 11, 13])
    return f"What is the remainder when {a}^{{{n}}} is divided by {m}?", str(pow(a, n, m))


def divisors(r: random.Random) -> tuple[str, str]:
    n = r.randint(24, 360)
    return f"How many positive divisors does {n} have?", str(sum(n % d == 0 for d in range(1, n + 1)))


def gcd(r: random.Random) -> tuple[str, str]:
    a, b = r.randint(24, 300), r.randint(24, 300)
    return f"What is the greatest common divisor of {a} and {b}?", str(math.gcd(a, b))


def lcm(r: random.Random) -> tuple[str, str]:
    a, b = r.randint(6, 40), r.randint(6, 40)
    text = (
        f"Two lamps flash every {a} and every {b} seconds, and flash together now. "
        "After how many seconds do they next flash together?"
    )
    return text, str(math.lcm(a, b))


def sum_of_fractions(r: random.Random) -> tuple[str, str]:
    a, b = Fraction(r.randint(1, 8), r.randint(3, 9)), Fraction(r.randint(1, 8), r.randint(3, 9))
    return f"Compute ${fraction(a)} + {fraction(b)}$ in lowest terms.", fraction(a + b)


def product_of_fractions(r: random.Random) -> tuple[str, str]:
    a, b = Fraction(r.randint(2, 9), r.randint(3, 11)), Fraction(r.randint(2, 9), r.randint(3, 11))
    return f"Compute ${fraction(a)} \\cdot {fraction(b)}$ in lowest terms.", fraction(a * b)


def arithmetic_sum(r: random.Random) -> tuple[str, str]:
    first, step, count = r.randint(1, 12), r.randint(2, 7), r.randint(8, 25)
    text = f"An arithmetic sequence begins with {first} and {first + step}. What is the sum of its first {count} terms?"
    return text, str(count * (2 * first + (count - 1) * step) // 2)


def geometric_term(r: random.Random) -> tuple[str, str]:
    first, ratio, n = r.randint(1, 6), r.choice([2, 3]), r.randint(4, 8)
    text = f"A geometric sequence begins with {first} and {first * ratio}. What is its term number {n}?"
    return text, str(first * ratio ** (n - 1))


def rectangle(r: random.Random) -> tuple[str, str]:
    a, b = r.randint(4, 30), r.randint(4, 30)
    return f"A rectangle has perimeter {2 * (a + b)} and one side of length {a}. What is its area?", str(a * b)


def right_triangle(r: random.Random) -> tuple[str, str]:
    k, (a, b, c) = r.randint(1, 6), r.choice([(3, 4, 5), (5, 12, 13), (8, 15, 17), (7, 24, 25)])
    return f"A right triangle has legs {a * k} and {b * k}. How long is its hypotenuse?", str(c * k)


def diagonal(r: random.Random) -> tuple[str, str]:
    side = r.randint(2, 15)
    return f"How long is the diagonal of a square of side {side}? Give an exact answer.", f"{side}\\sqrt{{2}}"


def circle(r: random.Random) -> tuple[str, str]:
    radius = r.randint(2, 20)
    return f"What is the area of a circle whose circumference is {2 * radius}\\pi?", f"{radius**2}\\pi"


def dice(r: random.Random) -> tuple[str, str]:
    total = r.randint(3, 11)
    ways = sum(a + b == total for a, b in product(range(1, 7), repeat=2))
    return f"Two fair dice are thrown. What is the probability that they add up to {total}?", fraction(
        Fraction(ways, 36)
    )


def coins(r: random.Random) -> tuple[str, str]:
    n = r.randint(3, 7)
    k = r.randint(1, n - 1)
    text = f"A fair coin is thrown {n} times. What is the probability of exactly {k} heads?"
    return text, fraction(Fraction(math.comb(n, k), 2**n))


def committee(r: random.Random) -> tuple[str, str]:
    n = r.randint(6, 12)
    k = r.randint(2, 4)
    return f"In how many ways can a committee of {k} be chosen from {n} people?", str(math.comb(n, k))


def letters(r: random.Random) -> tuple[str, str]:
    word = r.choice(
        [
            "LEVEL",
            "BANANA",
            "COFFEE",
            "LETTER",
            "SUMMER",
            "PEPPER",
            "ANNA",
            "BALLOON",
            "SUCCESS",
            "RIVER",
            "STONE",
            "TOMATO",
        ]
    )
    ways = math.factorial(len(word))
    for letter in set(word):
        ways //= math.factorial(word.count(letter))
    return f"In how many different orders can the letters of {word} be arranged?", str(ways)


def speed(r: random.Random) -> tuple[str, str]:
    v, t = r.randrange(40, 120, 10), Fraction(r.randint(3, 14), 2)
    return f"A train goes {fraction(v * t)} km at {v} km/h. How many minutes does it take?", fraction(t * 60)


def together(r: random.Random) -> tuple[str, str]:
    a, b = r.choice([(3, 6), (4, 12), (6, 12), (10, 15), (12, 6), (20, 30), (8, 24), (5, 20)])
    text = f"One pipe fills a tank in {a} hours, another in {b} hours. In how many hours do both together fill it?"
    return text, fraction(Fraction(a * b, a + b))


def mean(r: random.Random) -> tuple[str, str]:
    n, old, new = r.randint(4, 9), r.randint(60, 80), r.randint(81, 95)
    goal = new if new - old < 6 else old + 2
    text = f"The mean of {n} tests is {old}. What must the next one be for the mean of all {n + 1} to be {goal}?"
    return text, str(goal * (n + 1) - old * n)


def ages(r: random.Random) -> tuple[str, str]:
    (name, other), child, years = r.sample(NAMES, 2), r.randint(5, 14), r.randint(3, 10)
    factor = r.randint(2, 4)
    parent = factor * (child + years) - years
    text = (
        f"In {years} years {name} will be {factor} times as old as {other}, who is {child} now. How old is {name} now?"
    )
    return text, str(parent)


def digits(r: random.Random) -> tuple[str, str]:
    n, m = r.randint(2, 12), r.randint(2, 5)
    return f"What is the sum of the digits of {n}^{{{m}}}?", str(sum(map(int, str(n**m))))


def roots(r: random.Random) -> tuple[str, str]:
    a, b = r.sample([value for value in range(-7, 9) if value], 2)
    total, times = a + b, a * b
    text = f"What is the larger root of x^2 {-total:+d}x {times:+d} = 0?".replace("+", "+ ").replace(" -", " - ")
    return text, str(max(a, b))


def logarithm(r: random.Random) -> tuple[str, str]:
    base, power = r.choice([2, 3, 5]), r.randint(2, 6)
    return f"Which x satisfies \\log_{{{base}}} x = {power}?", str(base**power)


def mixture(r: random.Random) -> tuple[str, str]:
    a, b = r.randint(2, 9), r.randint(2, 9)
    p, q = r.choice([(10, 40), (20, 50), (5, 25), (30, 60)])
    text = f"{a} litres of a {p}% solution are mixed with {b} litres of a {q}% one. What percentage is the mixture?"
    return text, fraction(Fraction(a * p + b * q, a + b))


def clock(r: random.Random) -> tuple[str, str]:
    hour = r.randint(1, 12)
    half = r.choice([0, 30])
    angle = abs(Fraction(60 * hour % 720 + half, 2) - 6 * half)
    angle = min(angle, 360 - angle)
    time = f"{hour}:{half:02d}"
    return f"What is the smaller angle, in degrees, between the hands of a clock at {time}?", fraction(angle)


REASONING: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    *(shares, boxes, percent, back_percent, linear, two_unknowns, remainder, power_remainder, divisors, gcd, lcm),
    *(sum_of_fractions, product_of_fractions, arithmetic_sum, geometric_term, rectangle, right_triangle, diagonal),
    *(circle, dice, coins, committee, letters, speed, together, mean, ages, digits, roots, logarithm, mixture, clock),
)

PLACES = [
    "the lighthouse",
    "the empty theatre",
    "the night bus",
    "the greenhouse",
    "the ferry",
    "the ruined mill",
    "the library's cellar",
    "the weather station",
    "the fairground",
    "the old observatory",
    "the bakery before dawn",
    "the frozen canal",
]
WHO = [
    "a retired cartographer",
    "two sisters who do not speak",
    "the last beekeeper of the valley",
    "a boy who collects keys",
    "a translator without a country",
    "the understudy",
    "a clockmaker with shaking hands",
    "a postwoman and her dog",
    "the new caretaker",
    "an astronomer who is afraid of the dark",
    "a locksmith on her day off",
    "three cousins and a goat",
]
EVENTS = [
    "finds a letter addressed to the year before",
    "hears their own name on a dead radio",
    "opens a door that was painted on",
    "is handed the wrong suitcase",
    "wakes to find that the tide has not come back",
    "counts one stair too many",
    "learns that the map is still growing",
    "receives a birthday cake from nobody",
    "sees the same stranger in every photograph",
    "is asked to guard an empty chair",
    "discovers that the echo answers first",
    "loses a bet with the wind",
]
IMAGES = [
    "The kettle has gone quiet on the stove",
    "Rain keeps its appointments better than I do",
    "My grandmother's coat still holds the door",
    "There is a river folded in the atlas",
    "All winter the piano kept its mouth shut",
    "The streetlamps learn the names of moths",
    "Somebody has been mending the moon",
    "I have packed the house into one word",
    "The orchard counts itself at night",
    "A bicycle leans on the end of summer",
    "The snow forgets us one roof at a time",
    "We kept the sea in a blue enamel bowl",
]
FORMS = (
    "four more lines",
    "eight more lines, unrhymed",
    "a second stanza that turns the thought",
    "three more couplets",
)
JOKES = [
    "a penguin who joins a choir",
    "an accountant at the gates of heaven",
    "a self-driving wheelbarrow",
    "two snails on a motorway",
    "a vampire at the dentist",
    "the world's most patient plumber",
    "a parrot with a law degree",
    "a time traveller who is always late",
    "a chess-playing octopus",
    "a ghost who is afraid of children",
    "a cactus in couples therapy",
    "the mayor of a town of one",
    "a librarian at a heavy-metal concert",
    "a dog who reviews restaurants",
    "an alien at a school reunion",
    "a nervous volcano",
]
KINDS = (
    "a one-line joke",
    "a knock-knock joke",
    "a joke that ends in a pun",
    "a short joke with a surprise at the end",
)


def creative() -> Iterator[str]:
    """Every question of the creative kind, in a fixed order."""
    for image, form in product(IMAGES, FORMS):
        yield f'Continue this poem with {form}. It begins: "{image},"'
    for who, place, event in product(WHO, PLACES, EVENTS):
        yield f"Write a story of about 120 words that begins so: At {place}, {who} {event}."
    for who, kind in product(JOKES, KINDS):
        yield f"Write {kind} about {who}."


def reasoning(r: random.Random) -> Iterator[tuple[str, str]]:
    """Questions with answers, each once, the kinds in turn."""
    seen: set[str] = set()
    while True:
        for make in REASONING:
            question, answer = make(r)
            if question not in seen:
                seen.add(question)
                yield question, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("megatron_powerflow/recipes"))
    out = parser.parse_args().out
    r = random.Random(SEED)
    source = reasoning(r)
    pairs = [next(source) for _ in range(NUM_REASONING + NUM_HELD_OUT)]
    rows = [
        {"id": f"reasoning-{place:03d}", "task": "reasoning", "question": question, "answer": answer}
        for place, (question, answer) in enumerate(pairs)
    ]
    write(out / "reasoning.jsonl", rows[:NUM_REASONING])
    write(out / "reasoning_held_out.jsonl", rows[NUM_REASONING:])
    poems_and_jokes = [text for text in creative() if not text.startswith("Write a story")]
    stories = [text for text in creative() if text.startswith("Write a story")]
    wanted = NUM_CREATIVE + NUM_HELD_OUT
    texts = poems_and_jokes + r.sample(stories, wanted - len(poems_and_jokes))
    r.shuffle(texts)
    rows = [{"id": f"creative-{place:03d}", "task": "creative", "question": text} for place, text in enumerate(texts)]
    write(out / "creative.jsonl", rows[:NUM_CREATIVE])
    write(out / "creative_held_out.jsonl", rows[NUM_CREATIVE:])


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} prompts")


if __name__ == "__main__":
    main()
