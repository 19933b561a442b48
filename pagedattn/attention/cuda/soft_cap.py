"""The soft cap as a polynomial, where the softmax keeps the unit that takes exponentials busy.

`cap * tanh(x)` by an exponential and a division is two operations of that unit a score, beside the
softmax's one, and a multiprocessor does 16 of them a cycle but 128 multiplications and additions.
Where scores are well below the cap, an odd polynomial is within some units of float32's last place.
Which polynomial the kernel takes, or none, each warp decides for its rows of a tile: the largest
score of each must be no larger than a polynomial is good for.

That says nothing of scores far below zero, for which a polynomial goes on to fall as tanh does not.
Their weights have to be negligible by both: `least_peak` is how large each row's largest score so
far must be for that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pagedattn.attention.cuda.launching import LOG2_E
from pagedattn.attention.triton.primitives import FAR_CAP

NEGLIGIBLE_BITS = 24
"""A weight of 2 to minus this times the row's largest is what a sum in float32 rounds off.

Of many such weights little more is lost: a polynomial is near to tanh a little beyond its largest
x, and farther scores have less weight yet.
"""
LARGEST_CAP = FAR_CAP
"""Above it Triton's kernels are taken, which have tanh's series beside the formula here."""
_LEAST, _MOST = 1e-35, 1e35  # terms that float32 holds, with a margin


@dataclass(frozen=True)
class Polynomial:
    """An odd polynomial that is tanh(x), nearly, up to a largest x.

    Coefficients have the least largest relative error there is with as many terms, by linear
    programming over 1,500 points. The last is positive, so that it grows for all x.

    Attributes:
        largest: x.
        coefficients: of x, x³, x⁵ and so on.

    """

    largest: float
    coefficients: tuple[float, ...]

    def terms(self, soft_cap: float, scale: float) -> tuple[float, ...]:
        """Return what `CapTerms` of prefill_shape.cuh holds.

        Args:
            soft_cap: bound of the scores, above 0.
            scale: of the scores that the kernel has, so that `x = score * scale / soft_cap`.

        Returns:
            The largest score of a row, and the least peak in units of log2, for which the terms
            may be taken; then the terms, which take a score to units of log2. Where float32 cannot
            hold a term, no peak will do.

        """
        unit, bound = scale / soft_cap, soft_cap * LOG2_E
        with np.errstate(all="ignore"):  # what is too large or small is seen below
            powers = np.float64(unit) ** np.arange(1, 2 * len(self.coefficients), 2)
            terms = bound * powers * self.coefficients
        if not ((abs(terms) > _LEAST) & (abs(terms) < _MOST)).all():
            return (0.0, math.inf, *(0.0 for _ in terms))
        least_peak = NEGLIGIBLE_BITS - bound * math.tanh(self.largest)
        return (self.largest / unit, least_peak, *terms.tolist())


FEW_TERMS = Polynomial(0.3, (0.9999988635, -0.3331005725, 0.1263366394))
"""Within 1.5e-6 of tanh(x), in float32."""
ALL_TERMS = Polynomial(
    0.75, (0.9999994603, -0.3332838895, 0.1326023392, -0.0500910500, 0.0129591511)
)
"""Within 1e-6 of tanh(x), in float32."""
