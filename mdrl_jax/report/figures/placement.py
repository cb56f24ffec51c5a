"""Places the names of points in a chart so that none overlaps another name or covers a point, and few cross a line.

All coordinates are in px from the upper left corner of the chart.
"""

import dataclasses
import math
from collections.abc import Sequence

LETTER, LINE = 6.3, 15.0  # px of a letter and of a line of text of 12 px
MARK = 7.0  # half the width of a point
CROWD = 90.0  # px within which points are neighbours
NEAR = 16.0  # px between a point and its name up to which no line joins them
DISTANCES = (9, 14, 20, 28, 38, 50, 64, 80, 100, 125, 150)
DIRECTIONS = 16
# Costs in px of distance: a name moves up to CROSSED px further to avoid a line; an overlap is worse than any distance.
CROSSED, OVERLAP = 9.0, 1e4


@dataclasses.dataclass(frozen=True)
class Box:
    """A name: its centre, width and height in px."""

    x: float
    y: float
    width: float
    height: float = LINE

    def edge(self, x: float, y: float) -> tuple[float, float]:
        """The point of the box that is nearest to (x, y)."""
        half = self.width / 2, self.height / 2
        return (
            min(max(x, self.x - half[0]), self.x + half[0]),
            min(max(y, self.y - half[1]), self.y + half[1]),
        )

    def away(self, x: float, y: float) -> bool:
        """Whether the box is so far from (x, y) that a line should join them."""
        return math.dist(self.edge(x, y), (x, y)) > NEAR

    def overlaps(self, other: "Box") -> bool:
        """Whether the two boxes have a common part."""
        near_x = abs(self.x - other.x) < (self.width + other.width) / 2
        return near_x and abs(self.y - other.y) < (self.height + other.height) / 2


def between(x: float, y: float, x2: float, y2: float) -> Box:
    """The box of a horizontal or vertical line: its centre, and its extent, which is 0 in one direction.

    Args:
      x, y: one end of the line.
      x2, y2: the other end.
    """
    return Box((x + x2) / 2, (y + y2) / 2, abs(x2 - x), abs(y2 - y))


def place(
    points: Sequence[tuple[float, float]], names: Sequence[str], lines: Sequence[Box], width: float, height: float
) -> list[Box]:
    """Chooses a box for the name of each point.

    The most crowded points choose first. A name takes the nearest box that overlaps no point and no earlier name, and
    moves a little further if this avoids one of the `lines`. If there is no free box, it takes the one with the fewest
    overlaps.

    Args:
      points: (x, y) of each point in px.
      names: its name.
      lines: boxes of the lines in the chart.
      width, height: size of the chart in px.

    Returns:
      A box for each name, in the order of the points.

    Raises:
      ValueError: if none of the boxes around a point (`around`) lies within the chart, for example for a name that is
        wider.
    """
    marks = [Box(x, y, 2 * MARK, 2 * MARK) for x, y in points]
    crowd = [sum(math.dist(p, q) < CROWD for q in points) for p in points]
    found: dict[int, Box] = {}
    for i in sorted(range(len(points)), key=lambda i: (-crowd[i], i)):
        taken = [*marks, *found.values()]
        options = [b for b in around(*points[i], LETTER * len(names[i])) if inside(b, width, height)]
        costs = [_cost(b, points[i], taken, lines) for b in options]
        found[i] = options[costs.index(min(costs))]
    return [found[i] for i in range(len(points))]


def around(x: float, y: float, width: float) -> list[Box]:
    """Candidate boxes around a point, near ones first.

    Args:
      x, y: the point.
      width: width of the boxes.

    Returns:
      For each of `DISTANCES` a box in each of `DIRECTIONS` directions. The distance is from the point to the nearest
      edge of the box, in this direction. Boxes may lie outside the chart (`inside`).
    """
    boxes = []
    for distance in DISTANCES:
        for i in range(DIRECTIONS):
            angle = 2 * math.pi * i / DIRECTIONS
            across, down = math.cos(angle), math.sin(angle)
            beside = abs(across) > 0.2  # otherwise the box is above or below the point
            x_edge = x + distance * across + (math.copysign(width / 2, across) if beside else 0.0)
            y_edge = y + distance * down + (0.0 if beside else math.copysign(LINE / 2, down))
            boxes.append(Box(x_edge, y_edge, width))
    return boxes


def inside(box: Box, width: float, height: float) -> bool:
    """Whether a box lies wholly within the chart, whose edges it may touch.

    Args:
      box: the box of a name.
      width, height: size of the chart.
    """
    half = box.width / 2, box.height / 2
    return half[0] <= box.x <= width - half[0] and half[1] <= box.y <= height - half[1]


def _cost(box: Box, point: tuple[float, float], taken: Sequence[Box], lines: Sequence[Box]) -> float:
    away = math.dist(box.edge(*point), point)
    return away + OVERLAP * sum(map(box.overlaps, taken)) + CROSSED * sum(map(box.overlaps, lines))
