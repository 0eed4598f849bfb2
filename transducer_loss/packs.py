"""How adapters cut a batch for the loss of any joint network, whose logits they make pack by pack (arXiv 2211.16270)."""

from __future__ import annotations

import math

from transducer_loss.cells import Ints


def packs_of(frames: Ints, labels: Ints, most: int) -> list[tuple[int, int]]:
    """First and past the last utterance of packs of at most `most` padded cells, or of one utterance.

    Examples
    --------
    >>> import numpy as np
    >>> packs_of(np.array([4, 3, 9]), np.array([1, 2, 1]), most=24)
    [(0, 2), (2, 3)]
    """
    packs, begin, batch = [], 0, len(frames)
    for end in range(1, batch + 1):
        longer = slice(begin, end + 1)
        cells = (end + 1 - begin) * frames[longer].max() * (labels[longer].max() + 1)
        if end == batch or cells > most:
            packs.append((begin, end))
            begin = end
    return packs


def gradient_scale(frames: Ints, labels: Ints, fastemit_lambda: float) -> float:
    """Power of two that a pack's gradient is made with while the upstream one is not known.

    Logits of float16 would lose the small parts of their gradient, for loss scaling comes later. Over all cells the gradient of
    a class sums to at most twice the steps of a path, so that 2 ** 13 leaves hidden features of 8 in range.
    """
    steps = int(frames.sum() + labels.sum())
    return 2.0 ** (13 - math.frexp(2 * steps * (1 + fastemit_lambda))[1])
