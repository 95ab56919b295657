"""Scores that float32 arithmetic cannot tell apart are equal: they must not be ranked by their rounding errors."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESOLUTION = 1e-6  # of a logit of 1 or less, and relative to larger ones: 16 units in the last place of float32


def resolution(scores: ArrayLike) -> NDArray[np.float64]:
    """Return the distance within which scores are equal: what 1e-6 of a logit is worth there.

    With m = min(s, 1 − s) for a probability s, and m = |s| for any other score, it is 1e-6 · m · max(1, −log m).
    """
    s = np.asarray(scores, dtype=np.float64)
    m = np.where((s > 0) & (s < 1), np.minimum(s, 1 - s), np.abs(s))
    return np.asarray(RESOLUTION * m * np.maximum(1, -np.log(np.maximum(m, 1e-300))))


def tied(scores: ArrayLike) -> NDArray[np.float64]:
    """Return scores (n,) in which those that lie within `resolution` of each other are the same number.

    From the lowest score on, each group takes all that lie within the resolution of its lowest, and has its value. The
    scores come from logits in float32, so smaller differences are rounding errors. Equal slides then tie.

    Args:
        scores: (n,) finite.

    Example:
        >>> tied([0.5, 0.5000001, 0.7]).tolist()
        [0.5, 0.5, 0.7]
    """
    s = np.asarray(scores, dtype=np.float64)
    order = np.argsort(s, kind="stable")
    rising = s[order]
    limit = rising + resolution(rising)
    chains = np.flatnonzero(np.append(True, rising[1:] > limit[:-1])) if len(s) else np.zeros(0, np.int64)
    ends = np.append(chains[1:], len(s))
    lowest = rising.copy()
    for start, end in zip(chains[ends - chains > 1].tolist(), ends[ends - chains > 1].tolist(), strict=True):
        while start < end:  # neighbours are close all along a chain, its ends may not be
            stop = start + int(np.searchsorted(rising[start:end], limit[start], side="right"))
            lowest[start:stop] = rising[start]
            start = stop
    result = np.empty_like(s)
    result[order] = lowest
    return result
