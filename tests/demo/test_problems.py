"""The word problems: the arithmetic is right, whichever way it is worked."""

import re
from itertools import pairwise
from typing import Any

import pytest

from flowstream.demo.problems import LEVELS, Problem, make_problems, read_answer

EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")
APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return make_problems(800, seed=7)


def of_level(problems: list[Problem], level: str) -> list[Problem]:
    return [problem for problem in problems if problem.level == level]


@pytest.mark.parametrize("level", ["docstring", "steps", "long"])
def test_every_equation_holds_and_the_last_gives_the_answer(problems: list[Problem], level: str) -> None:
    for problem in of_level(problems, level):
        equations = EQUATION.findall(problem.worked)
        assert len(equations) >= 2
        for left, sign, right, result in equations:
            assert APPLY[sign](int(left), int(right)) == int(result) >= 0
        assert int(equations[-1][-1]) == problem.answer == read_answer(problem.worked)


@pytest.mark.parametrize("level", ["docstring", "steps", "long"])
def test_every_number_of_the_question_is_used_once_and_results_are_carried_on(
    problems: list[Problem], level: str
) -> None:
    for problem in of_level(problems, level):
        steps = [(int(left), int(right), int(result)) for left, _, right, result in EQUATION.findall(problem.worked)]
        given = sorted(map(int, re.findall(r"\d+", problem.question)))
        used = [steps[0][0], *(right for _, right, _ in steps)]
        assert sorted(used) == given
        assert all(before[2] == after[0] for before, after in pairwise(steps))


def test_worked_classes_run_and_give_the_answer(problems: list[Problem]) -> None:
    for problem in of_level(problems, "code"):
        methods, _, _ = problem.worked.partition("\nAnswer:")
        scope: dict[str, Any] = {}
        exec(f"class Worked:\n{methods}", scope)
        assert scope["Worked"]().items == problem.answer == read_answer(problem.worked) > 0


def test_levels_come_in_equal_parts(problems: list[Problem]) -> None:
    assert {level: len(of_level(problems, level)) for level in LEVELS} == dict.fromkeys(LEVELS, 200)


def test_the_same_seed_gives_the_same_problems_and_another_seed_others(problems: list[Problem]) -> None:
    assert make_problems(800, seed=7) == problems
    assert make_problems(800, seed=8) != problems


def test_questions_and_keys_are_distinct_and_excluded_ones_are_not_asked_again(problems: list[Problem]) -> None:
    others = make_problems(400, seed=9, exclude=problems)
    questions = [problem.question for problem in problems + others]
    assert len(set(questions)) == len(questions) == 1200
    assert len({problem.key for problem in problems}) == 800


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Answer: 12", 12), ("1 + 1 = 2\nAnswer: 2\n", 2), ("Answer: 3\nAnswer: -4", -4), ("Answer:", None), ("12", None)],
)
def test_the_answer_is_the_last_one_named(text: str, answer: int | None) -> None:
    assert read_answer(text) == answer
