"""The pre-training text."""

from pathlib import Path

import pytest

from flowstream.demo.corpus import MAX_HELD_OUT_CHARS, Corpus, build_corpus, read_modules, split_of

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def modules() -> dict[str, str]:
    return read_modules()


@pytest.fixture(scope="module")
def corpus(modules: dict[str, str]) -> Corpus:
    return build_corpus(modules)


def test_no_block_occurs_twice_in_or_across_splits(corpus: Corpus) -> None:
    blocks = [" ".join(block.split()) for name in SPLITS for block in getattr(corpus, name)]
    assert len(blocks) == len(set(blocks)) > 10_000


def test_every_split_has_text_and_training_has_most(corpus: Corpus) -> None:
    sizes = {name: sum(map(len, getattr(corpus, name))) for name in SPLITS}
    assert sizes["train"] > 3_000_000
    assert all(100_000 < sizes[name] < sizes["train"] / 4 for name in ("validation", "test"))


def test_the_split_is_the_same_every_time_and_does_not_depend_on_other_modules(modules: dict[str, str]) -> None:
    assert split_of("json/decoder.py") == split_of("json/decoder.py")
    assert build_corpus(modules, max_train_chars=100_000).test == build_corpus(dict(reversed(modules.items()))).test
    assert [split_of(f"module_{number}.py") for number in range(6)] == ["train"] * 6
    shares = [split_of(f"module_{number}.py") for number in range(5_000)]
    assert shares.count("validation") == pytest.approx(300, abs=60)
    assert shares.count("test") == pytest.approx(300, abs=60)


def test_a_bound_shortens_the_training_text_only(modules: dict[str, str], corpus: Corpus) -> None:
    short = build_corpus(modules, max_train_chars=200_000)
    assert short.validation == corpus.validation
    assert 200_000 <= sum(map(len, short.train)) < 1_000_000
    assert short.train == corpus.train[: len(short.train)]


def test_tests_and_installed_packages_and_build_files_are_left_out(tmp_path: Path) -> None:
    text = "def function_of_some_length(argument):\n    return argument + 1\n"
    kept = ["good.py", "package/inner.py"]
    left_out = [
        "test/test_x.py",
        "package/tests/x.py",
        "site-packages/torch.py",
        "idlelib/run.py",
        "_sysconfigdata__linux.py",
        "encodings/cp037.py",
    ]
    for name in kept + left_out:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert read_modules(tmp_path) == dict.fromkeys(kept, text)


def test_a_block_shared_with_a_held_out_module_stays_out_of_training() -> None:
    names = [f"m{number}.py" for number in range(400)]
    held_out = next(name for name in names if split_of(name) == "test")
    training = next(name for name in names if split_of(name) == "train")
    shared = "def shared_between_two_modules(argument):\n    return argument"
    own = "def that_one_module_has_alone(argument):\n    return argument"
    corpus = build_corpus({training: f"{shared}\n\n{own}", held_out: shared})
    assert corpus.test == (shared,)
    assert corpus.train == (own,)


def test_one_held_out_module_cannot_dominate_its_split() -> None:
    name = next(name for name in (f"m{number}.py" for number in range(400)) if split_of(name) == "validation")
    text = "\n\n".join(f"def function_number_{number}(argument):\n    return {number}" for number in range(2_000))
    assert 0 < sum(map(len, build_corpus({name: text}).validation)) <= MAX_HELD_OUT_CHARS
