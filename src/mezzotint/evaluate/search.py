"""Compass search for guidance scale, guidance interval and EMA width: a function of a distance.

Compass search (Kolda, Lewis and Torczon 2003, section 1) needs no derivatives: try a step each way
along every axis, move to what is better, halve the steps where nothing is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated

from mezzotint.core.fields import Checked, Range

# Our choice: the first step of each axis, and the halvings after it.
SCALE_FACTOR, WIDTH_FACTOR, INTERVAL_STEP = 1.5, 2.0, 0.25
STEPS = (1.0, 0.5, 0.25)
LARGEST_SCALE = 10.0
NARROWEST, WIDEST = 0.01, 0.25  # EMA widths, the range of EDM2's figures 5 and 6

Fraction = Annotated[float, Range(0, 1)]


@dataclass(frozen=True, kw_only=True)
class Candidate(Checked):
    """A point of the search; the default is the model as it is, without guidance.

    width: of the post-hoc average; None for the average of training.
    scale: of guidance, as DiT counts it.
    first, last: fractions of the sampler's steps between which guidance acts, 0 at pure noise.
    """

    width: Annotated[float, Range(0, 0.2887, above=True)] | None = None
    scale: Annotated[float, Range(1, LARGEST_SCALE)] = 1.0
    first: Fraction = 0.0
    last: Fraction = 1.0


@dataclass(frozen=True, kw_only=True)
class Space:
    """What can be searched.

    guided: the model can be guided. widths: of the run's snapshots; empty without any.
    steps: of the sampler, at which the interval's ends lie.
    """

    guided: bool
    widths: tuple[float, ...] = ()
    steps: int = 50

    @property
    def axes(self) -> int:
        """The number of axes: scale and both ends of the interval, and width."""
        return 3 * self.guided + bool(self.widths)

    def neighbours(self, at: Candidate, step: float) -> Iterator[Candidate]:
        """Yield the candidates one step away, each way along every axis."""
        yield from self._widths(at, step)
        if not self.guided:
            return
        for sign in (step, -step):
            scale = min(at.scale * SCALE_FACTOR**sign, LARGEST_SCALE)
            yield self._rounded(replace(at, scale=max(scale, 1.0)))
        if at.scale == 1:
            return
        for sign in (step, -step):
            first = min(max(at.first + sign * INTERVAL_STEP, 0.0), 1.0)
            yield self._rounded(replace(at, first=first))
            last = min(max(at.last - sign * INTERVAL_STEP, 0.0), 1.0)
            yield self._rounded(replace(at, last=last))

    def probes(self) -> Iterator[Candidate]:
        """Yield where the search begins besides the default: guidance of the middle steps only.

        Guidance at high noise may harm so much that every scale loses without an interval
        (arXiv 2404.07724).
        """
        if self.guided:
            yield self._rounded(Candidate(scale=SCALE_FACTOR, first=0.25, last=0.75))

    def _widths(self, at: Candidate, step: float) -> Iterator[Candidate]:
        if not self.widths:
            return
        if at.width is None:
            widths = list(self.widths)
        else:
            widths = [at.width * WIDTH_FACTOR**sign for sign in (step, -step)]
        for width in widths:
            clamped = min(max(width, NARROWEST), WIDEST)
            yield replace(at, width=float(f"{clamped:.3g}"))

    def _rounded(self, at: Candidate) -> Candidate:
        """Return the candidate on round numbers: scales of 0.05, ends between two steps.

        Guidance of no step is no guidance.
        """
        scale = round(at.scale * 20) / 20
        first, last = (round(end * self.steps) for end in (at.first, at.last))
        if scale == 1 or first >= last:
            return Candidate(width=at.width)
        return replace(at, scale=scale, first=first / self.steps, last=last / self.steps)


def compass_search(
    measure: Callable[[Candidate], float | None], space: Space
) -> dict[Candidate, float]:
    """Return the distance of every candidate measured, the default first, in order.

    Args:
        measure: distance of a candidate, called once for each; None where the budget does not
            reach for it.
    """
    found: dict[Candidate, float] = {}
    refused: set[Candidate] = set()

    def try_out(candidate: Candidate) -> None:
        if candidate in found or candidate in refused:
            return
        distance = measure(candidate)
        if distance is None:
            refused.add(candidate)
        else:
            found[candidate] = distance

    for candidate in (Candidate(), *space.probes()):
        try_out(candidate)
    for step in STEPS:
        moved = bool(found)
        while moved:
            best = min(found, key=lambda c: found[c])
            for candidate in space.neighbours(best, step):
                try_out(candidate)
            moved = min(found.values()) < found[best]
    return found
