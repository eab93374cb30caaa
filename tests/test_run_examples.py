"""The beginnings of captions, if there are only a few."""

import pytest

from transfusion_mot.run.examples import beginnings

THINGS = ("octopus", "red apple", "sun", "man firefighter")


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (
            [f"{style} emoji of {thing}" for style in ("noto", "noto v1", "fluent") for thing in THINGS * 5],
            {"noto emoji of", "noto v1 emoji of", "fluent emoji of"},
        ),
        ([f"a photo of {thing}" for thing in THINGS * 5], set()),
        ([f"{number} things" for number in range(100)], set()),
        (["sun", "moon"], set()),
        ([], set()),
    ],
)
def test_beginnings(captions: list[str], expected: set[str]) -> None:
    assert set(beginnings(captions)) == expected
