"""Reading order and rotary positions, against written-out rules."""

import numpy as np
import pytest

from transfusion_mot.models.positions import PositionCounter

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st


def test_one_axis_counts_every_slot() -> None:
    counter = PositionCounter("1d")
    orders, positions = zip(counter.text(3), counter.image(2, 3), counter.text(2), strict=True)
    assert np.concatenate(orders).tolist() == list(range(11))
    assert np.concatenate(positions).tolist() == list(range(11))


def test_three_axes_by_hand() -> None:
    counter = PositionCounter("3d")
    order, position = counter.text(2)
    assert (order.tolist(), position.tolist()) == ([0, 1], [[0, 0, 0], [1, 1, 1]])
    order, position = counter.image(2, 3)
    assert order.tolist() == [2, 3, 4, 5, 6, 7]
    assert position.tolist() == [[2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3], [2, 3, 4]]
    order, position = counter.text(1)
    assert (order.tolist(), position.tolist()) == ([8], [[5, 5, 5]])
    order, position = counter.image(3, 1)
    assert position.tolist() == [[6, 6, 6], [6, 7, 6], [6, 8, 6]]
    assert counter.text(1)[1].tolist() == [[9, 9, 9]]


SEGMENTS = st.lists(st.one_of(st.integers(0, 5), st.tuples(st.integers(1, 4), st.integers(1, 4))), max_size=6)


@given(SEGMENTS)
def test_positions_never_go_back_and_no_slot_is_like_another(segments) -> None:
    counter = PositionCounter("3d")
    orders, seen, largest = [], set(), -1
    for segment in segments:
        order, positions = counter.text(segment) if isinstance(segment, int) else counter.image(*segment)
        orders += order.tolist()
        if positions.size:
            assert positions.min() > largest, "what follows begins behind everything before"
            largest = int(positions.max())
        for position in map(tuple, positions.tolist()):
            assert position not in seen
            seen.add(position)
    assert orders == list(range(len(orders)))


@given(st.lists(st.integers(0, 5), max_size=6))
def test_text_does_not_depend_on_where_it_is_cut(lengths) -> None:
    cut, whole = PositionCounter("3d"), PositionCounter("3d")
    parts = [cut.text(length) for length in lengths]
    order, positions = whole.text(sum(lengths))
    assert [o for part, _ in parts for o in part.tolist()] == order.tolist()
    assert [p for _, part in parts for p in part.tolist()] == positions.tolist()
