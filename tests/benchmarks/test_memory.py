import math

import pytest

from .scripts import load

pytestmark = pytest.mark.slow

load("speed_worker")
memory = load("memory")

TINY = memory.Shape(layers=1, hidden=8, vocabulary=16, prompt=2, completion=3, batch=4)


@pytest.mark.parametrize("layout", memory.LAYOUTS)
def test_a_layout_trains(layout):
    memory.train(memory.LAYOUTS[layout][1] | {"checkpointing": False}, TINY)


def test_each_role_of_its_own_is_predicted_to_take_more():
    found = {}
    for layout, (_, row) in memory.LAYOUTS.items():
        found[layout] = memory.predicted(row | {"checkpointing": True}, memory.BASE)
    assert found.pop(memory.SFT).weights < found[memory.ADAPTER].weights
    order = (memory.FUNCTION, memory.ADAPTER, memory.SHARED, memory.SEPARATE, memory.FULL)
    assert [found[layout].peak for layout in order] == sorted(part.peak for part in found.values())


def test_a_slope_is_that_of_the_last_two_points():
    assert memory.slope([1.0, 10.0, 20.0], [7.0, 3.0, 12.0]) == pytest.approx(2.0)
    assert math.isclose(memory.slope([1.0, 2.0], [5.0, 5.0]), 0.0)
