"""What the numbers of a run with a fake score look like, in words: a late fake score, too much guidance, collapse.

A trend compares the mean over a fifth of the student's steps with that over the last fifth. docs/reading.md shows the
curves that the thresholds come from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

LEAST = 50
"""Steps of the student, below which nothing is said."""
PARTS = 5
FIRST = 1
"""The part that the last one is compared with: in the one before it student and fake score still find each other."""
MISSES = 1.0
"""Size of `miss` in any later part: the images have moved as far as the fake score sees them from the teacher."""
GAP_STAYS = 0.7
"""`gap` at the end, of a run whose fake score keeps up and whose guidance pulls on all the same."""
GAP_RISES = 1.25
COSINE_FALLS = 0.05
STD_RISES = 1.1
SPREAD_FALLS = 0.6
"""The spread at the end, in units of its highest before."""
DIVERSITY_FALLS = 0.5
"""Diversity of the student's images of one prompt, in units of the teacher's."""

Points = Sequence[Sequence[float | None]]
LAG = (
    "The fake score looks late: {why}. Raise fake.updates or fake.lr_factor, lengthen fake.head_start, or lower "
    "optimiser.lr."
)
OVER = (
    "Guidance looks too strong: the contrast of the student's images (std) grew {rise:.1f}-fold while the teacher "
    "pulled on (gap). Lower matching.guidance, stop earlier, or take objective=decoupled."
)
COLLAPSE = (
    "The student's images look collapsed: their spread fell to {share:.0%} of its highest. Lower matching.guidance or "
    "matching.weight, or take the preset dp-dmd."
)


@dataclass(frozen=True)
class Trend:
    """Means of a curve over parts of it.

    Attributes:
        early: over the part that is compared with.
        late: over the last one.
        highest: of all parts.
        farthest: from 0, of the later parts.
    """

    early: float
    late: float
    highest: float
    farthest: float

    @property
    def rise(self) -> float:
        """The last part in units of the early one."""
        return self.late / self.early if self.early > 0 else 1.0


def trend(points: Points) -> Trend | None:
    """See `Trend`; None for a curve that is too short."""
    values = [value for _, value in points if value is not None]
    if len(values) < LEAST:
        return None
    count = len(values)
    parts = [fmean(values[i * count // PARTS : (i + 1) * count // PARTS]) for i in range(PARTS)]
    return Trend(parts[FIRST], parts[-1], max(parts), max(map(abs, parts[FIRST:])))


def symptoms_of(curves: Mapping[str, Points]) -> list[str]:
    """Sentences about a run, none of a healthy one or one without a fake score.

    Args:
        curves: name of what was logged -> its points (step, value), as `curves_from_rows` gives them.

    Reference: arXiv:2405.14867 (DMD2), on updates of the fake score; arXiv:2511.22677 (Decoupled DMD), on guidance.
    """
    found: dict[str, None] = {}
    for name in curves:
        if name.rsplit("/", 1)[-1] == "gap":
            found |= dict.fromkeys(_of_space(curves, name.removesuffix("gap")))
    return list(found)


def _of_space(curves: Mapping[str, Points], prefix: str) -> list[str]:
    names = ("gap", "cosine", "std", "spread", "miss")
    gap, cosine, std, spread, miss = (trend(curves.get(prefix + name, ())) for name in names)
    if not gap or not cosine or not std:
        return []
    said = []
    late = miss is not None and miss.farthest >= MISSES
    if std.rise >= STD_RISES and not late and (gap.rise >= GAP_RISES or gap.late >= GAP_STAYS):
        said.append(OVER.format(rise=std.rise))
    elif miss and late:
        why = f"the images moved {miss.farthest:.1f} times as far as it saw them from the teacher (miss)"
        said.append(LAG.format(why=why))
    elif gap.rise >= GAP_RISES and cosine.early - cosine.late >= COSINE_FALLS:
        why = f"gap grew {gap.rise:.1f}-fold while cosine fell from {cosine.early:.2f} to {cosine.late:.2f}"
        said.append(LAG.format(why=why))
    if spread and spread.late <= SPREAD_FALLS * spread.highest:
        said.append(COLLAPSE.format(share=spread.late / spread.highest))
    return said
