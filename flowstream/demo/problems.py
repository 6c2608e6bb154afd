"""The fine-tuning problems: generated word problems with worked answers, from one step of code to long arithmetic."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A question, its worked answer, and the number that the answer must end in."""

    key: str
    level: str
    """One of `LEVELS`, from near to the pre-training text to far from it."""
    question: str
    worked: str
    """Ends in `Answer: <number>`."""
    answer: int


def make_problems(num_problems: int, seed: int, exclude: Sequence[Problem] = ()) -> list[Problem]:
    """Distinct problems, levels in turn, then shuffled; none asks what one of `exclude` asks.

    Raises ValueError where there are not as many.
    """
    rng = random.Random(seed)
    asked = {problem.question for problem in exclude}
    names = list(LEVELS)
    problems: list[Problem] = []
    num_refused = 0
    while len(problems) < num_problems:
        if num_refused > 50 * num_problems:
            raise ValueError(
                f"there are not {num_problems} distinct problems beside {len(exclude)} others; ask for fewer"
            )
        level = names[len(problems) % len(names)]
        question, worked, answer = LEVELS[level](rng)
        if question in asked:
            num_refused += 1
            continue
        asked.add(question)
        key = f"{seed:04d}-{len(problems):06d}"
        problems.append(
            Problem(key=key, level=level, question=question, worked=f"{worked}\nAnswer: {answer}", answer=answer)
        )
    rng.shuffle(problems)
    return problems


def read_answer(text: str) -> int | None:
    """The number after the last `Answer:`, or None where there is none."""
    found = re.findall(r"Answer: (-?\d+)\b", text)
    return int(found[-1]) if found else None


_PARTS = (
    "bytes",
    "entries",
    "errors",
    "files",
    "items",
    "keys",
    "lines",
    "names",
    "objects",
    "tests",
    "threads",
    "values",
)
_PLACES = ("buffer", "cache", "dict", "directory", "list", "module", "queue", "stream")
_PEOPLE = ("Amara", "Bjorn", "Dmitri", "Hiroshi", "Ingrid", "Mateo", "Noor", "Priya", "Tomasz", "Zanele")
_GOODS = ("apples", "bricks", "candles", "eggs", "melons", "mugs", "pencils", "shirts", "stamps", "tiles")


def _code(rng: random.Random) -> tuple[str, str, int]:
    """One step between small numbers; the answer is worked in the idiom of a constructor."""
    person, place = rng.choice(_PEOPLE), rng.choice(_PLACES)
    start, change = rng.randint(1, 5), rng.randint(1, 3)
    adds = start <= change or rng.random() < 0.5
    event, sign = ("adds", "+") if adds else ("removes", "-")
    answer = start + change if adds else start - change
    question = f"The {place} has {start} items. {person} {event} {change}."
    worked = (
        f"    def __init__(self, *args, **kwargs):\n"
        f"        super().__init__(*args, **kwargs)\n"
        f"        self.items = {start} {sign} {change}\n"
    )
    return question, worked, answer


def _docstring(rng: random.Random) -> tuple[str, str, int]:
    """Two steps, worked in the English of docstrings."""
    part = rng.choice(_PARTS)
    start, added = rng.randint(4, 12), rng.randint(2, 9)
    total = start + added
    removed = rng.randint(1, min(9, total - 1))
    answer = total - removed
    question = f"There are {start} {part}. Then {added} are added, and {removed} are removed."
    worked = (
        f'    """Return the number of {part} in the list.\n\n'
        f"    If {added} are added, this is {start} + {added} = {total}. "
        f"If {removed} are removed, return {total} - {removed} = {answer}.\n"
        f'    """'
    )
    return question, worked, answer


def _steps(rng: random.Random) -> tuple[str, str, int]:
    """Three steps of school arithmetic, worked as equations."""
    person = rng.choice(_PEOPLE)
    goods = rng.choice(_GOODS)
    boxes, each, more = rng.randint(2, 9), rng.randint(3, 12), rng.randint(2, 30)
    product = boxes * each
    total = product + more
    given = rng.randint(1, total - 1)
    answer = total - given
    question = f"{person} buys {boxes} boxes of {each} {goods}, finds {more} and loses {given}."
    worked = f"{boxes} * {each} = {product}\n{product} + {more} = {total}\n{total} - {given} = {answer}"
    return question, worked, answer


def _long(rng: random.Random) -> tuple[str, str, int]:
    """Three steps between numbers of three and four digits."""
    person, goods = rng.choice(_PEOPLE), rng.choice(_GOODS)
    first, second, price = rng.randint(120, 480), rng.randint(120, 480), rng.randint(3, 9)
    made = first + second
    lost = rng.randint(11, 99)
    left = made - lost
    answer = left * price
    question = f"{person} makes {first} and {second} {goods}, breaks {lost} and sells each for {price}."
    worked = f"{first} + {second} = {made}\n{made} - {lost} = {left}\n{left} * {price} = {answer}"
    return question, worked, answer


LEVELS: dict[str, Callable[[random.Random], tuple[str, str, int]]] = {
    "code": _code,
    "docstring": _docstring,
    "steps": _steps,
    "long": _long,
}
"""Level → generator of (question, worked answer, answer). The first two speak the language of the pre-training text."""
