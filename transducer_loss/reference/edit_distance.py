"""Two sequences of labels -> how many insertions, deletions and substitutions make one of the other."""

import numpy as np
from numpy.typing import ArrayLike


def edit_distance(hypothesis: ArrayLike, reference: ArrayLike, blank: int | None = None) -> tuple[int, int, int, int]:
    """Least number of errors by which a hypothesis can have come of its reference, and of what kind they are.

    Of the alignments with the fewest errors it is that with the fewest insertions. As ``insertions - deletions`` is the
    difference of the lengths, it has the fewest deletions and the most substitutions too.

    Parameters
    ----------
    hypothesis, reference : array_like, int, shape (L,) and (U,)
        Labels; either may be empty.
    blank : int, optional
        A class that is left out of both beforehand.

    Returns
    -------
    total, insertions, deletions, substitutions : int
        The edit distance (Levenshtein), and what it is the sum of. An insertion is a label of the hypothesis that the
        reference has not.

    Examples
    --------
    >>> edit_distance([1, 2, 3], [2, 4, 3, 5])
    (3, 0, 1, 2)
    >>> edit_distance([0, 7, 0], [], blank=0)
    (1, 1, 0, 0)
    """
    said, meant = ([int(label) for label in np.asarray(labels) if label != blank] for labels in (hypothesis, reference))
    best = [(u, 0) for u in range(len(meant) + 1)]  # errors and insertions of the labels so far against u of the others
    for label in said:
        above, best = best, [(best[0][0] + 1, best[0][1] + 1)]
        for u, other in enumerate(meant):
            best.append(min((above[u][0] + (label != other), above[u][1]),
                            (above[u + 1][0] + 1, above[u + 1][1] + 1),
                            (best[u][0] + 1, best[u][1])))
    total, insertions = best[-1]
    deletions = insertions + len(meant) - len(said)
    return total, insertions, deletions, total - insertions - deletions
