"""Names in a chart: none over another or over a point, near their points, off lines where that costs little."""

import math

import numpy as np
import pytest

from mdrl_jax.report.figures.placement import DISTANCES, MARK, Box, around, between, inside, place


@pytest.mark.parametrize("seed", range(8))
def test_no_name_covers_a_name_or_a_point(seed: int):
    rng = np.random.default_rng(seed)
    points = [(float(x), float(y)) for x, y in rng.normal((200, 200), (60, 60), (16, 2)).clip(5, 395)]
    names = ["x" * int(n) for n in rng.integers(3, 17, 16)]
    boxes = place(points, names, [], 600, 400)
    for i, box in enumerate(boxes):
        assert inside(box, 600, 400)
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert not any(box.overlaps(Box(x, y, 2 * MARK, 2 * MARK)) for x, y in points)
        assert math.dist(box.edge(*points[i]), points[i]) < 110


def test_a_lone_name_is_as_near_as_may_be_and_needs_no_line():
    (box,) = place([(100.0, 100.0)], ["name"], [], 300, 300)
    assert math.dist(box.edge(100, 100), (100, 100)) <= DISTANCES[0] + 1e-9 and not box.away(100, 100)


def test_a_name_leaves_a_line_if_it_can():
    across = between(0, 100, 300, 100)
    free, beside = (place([(100.0, 100.0)], ["name"], lines, 300, 300)[0] for lines in ([], [across]))
    assert free.overlaps(across) and not beside.overlaps(across)


def test_boxes_touch_without_overlap_and_know_their_nearest_point():
    box = Box(10, 10, 20, 10)
    assert not box.overlaps(Box(30, 10, 20, 10)) and box.overlaps(Box(29, 10, 20, 10))
    assert not box.overlaps(Box(10, 20, 20, 10)) and box.overlaps(Box(10, 19, 20, 10))
    assert box.edge(100, 11) == (20, 11) and box.edge(12, -5) == (12, 5)
    assert box.away(60, 10) and not box.away(30, 10)


def test_every_box_is_at_its_distance():
    found = sorted({round(math.dist(b.edge(50, 50), (50, 50)), 6) for b in around(50, 50, 40)})
    assert min(found) >= 0 and max(found) <= max(DISTANCES) + 1e-6
