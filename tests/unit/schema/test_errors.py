from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from codeherd_schema import errors
from codeherd_schema.errors import CodeherdError, PromptTooLong


def all_of(cls: type[CodeherdError] = CodeherdError) -> Iterator[type[CodeherdError]]:
    yield cls
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from all_of(child)


def drawn_tree() -> dict[str, str]:
    """Parent of each class name, as the module's docstring draws it."""
    assert errors.__doc__ is not None
    path: list[str] = []
    parents: dict[str, str] = {}
    for line in errors.__doc__.splitlines():
        found = re.match(r"^ {4}((?:[│├└─] *|    )*)([A-Z]\w+)", line)
        if not found:
            continue
        depth = len(found[1]) // 4
        del path[depth:]
        parents[found[2]] = path[-1] if path else "Exception"
        path.append(found[2])
    return parents


def test_codes_are_unique_words() -> None:
    codes = [cls.code for cls in all_of()]

    assert len(codes) == len(set(codes))
    assert all(re.fullmatch(r"[a-z][a-z_]*", code) for code in codes)
    assert all("code" in vars(cls) for cls in all_of())


def test_docstring_draws_exactly_the_tree() -> None:
    assert drawn_tree() == {cls.__name__: cls.__bases__[0].__name__ for cls in all_of()}


@pytest.mark.parametrize("cls", list(all_of()))
def test_class_docstring_is_the_default_message(cls: type[CodeherdError]) -> None:
    assert cls.__doc__ is not None
    message = cls().message

    assert message == str(cls()) == cls.__doc__.splitlines()[0].rstrip(".")
    assert "\n" not in message
    assert cls().hint is None


def test_instance_adds_the_figures_and_a_hint() -> None:
    error = PromptTooLong("prompt has 5012 tokens, room for 4096", hint="shorten it")

    assert (error.message, str(error), error.hint) == (
        "prompt has 5012 tokens, room for 4096",
        "prompt has 5012 tokens, room for 4096",
        "shorten it",
    )


def test_bad_input_is_never_worth_another_try() -> None:
    assert not any(cls.retryable for cls in all_of(errors.InvalidRequest))
    assert all(cls.retryable for cls in all_of(errors.ServiceUnavailable))
    assert not errors.LeaseLost.retryable
