"""How far the run had come when: points evenly spread over it, few enough for a page however long it is."""

from dataclasses import dataclass

POINTS = 240  # at most; then every second one is left out


@dataclass(frozen=True)
class Point:
    """seconds: since the first client joined. samples: learned from by then. up, down: bytes of messages."""

    seconds: float
    samples: int
    up: int
    down: int


class History:
    """Counts, not rates: between any two points that are left the mean rate is exact."""

    def __init__(self, step: float = 2.0) -> None:
        self._step = step  # seconds from a point to the next, at least
        self.points: tuple[Point, ...] = ()

    def add(self, point: Point) -> bool:
        """Whether it is one that is kept."""
        if self.points and point.seconds < self.points[-1].seconds + self._step:
            return False
        self.points += (point,)
        if len(self.points) > POINTS:
            self.points = self.points[::2]
            self._step *= 2
        return True
