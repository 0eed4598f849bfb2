"""Which classes a sampled softmax looks at, and the probability with which every class could have been one of them.

Weights and sums are integers, as those of the kernels, so that the same classes are picked, not only as probable ones.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transducer_loss.reference.lattice import F8, I8


def sample_classes(targets: ArrayLike, target_lengths: ArrayLike, *, vocab_size: int, num_samples: int,
                   proposal: str = "uniform", scope: str = "batch", counts: ArrayLike | None = None,
                   ctc_logits: ArrayLike | None = None, ctc_lengths: ArrayLike | None = None, blank: int = 0,
                   correction: bool = False, seed: int = 0, step: int = 0) -> tuple[I8, NDArray[np.object_]]:
    """Blank, labels and negatives drawn without replacement, exactly those of `transducer_loss.sample_classes`.

    Parameters
    ----------
    targets, target_lengths, vocab_size, num_samples, proposal, scope, counts, ctc_logits, ctc_lengths, blank
        As in `transducer_loss.sample_classes`, unchecked.
    correction, seed, step
        As there.

    Returns
    -------
    ids : ndarray, int64, shape (K,) or (B, K)
        The blank, then the others in rising order.
    probability : ndarray of `fractions.Fraction`, shape (V,) or (B, V)
        Of each class to be one of `ids`; the sum is K.

    Examples
    --------
    >>> ids, probability = sample_classes([[3]], [1], vocab_size=6, num_samples=2)
    >>> ids.shape, {0, 3} < set(ids.tolist()), [str(p) for p in probability]
    ((4,), True, ['1', '1/2', '1/2', '1', '1/2', '1/2'])
    """
    labels, lengths = np.asarray(targets), np.asarray(target_lengths)
    V, (B, U) = vocab_size, labels.shape
    batches = [[b] for b in range(B)] if scope == "utterance" else [list(range(B))]
    slots = min(V, 1 + len(batches[0]) * U + num_samples)
    weights = [1] * V if counts is None else count_weights(counts)
    ids, probability = [], []
    for row, batch in enumerate(batches):
        if ctc_logits is not None and ctc_lengths is not None:
            frames = [frame for b in batch for frame in np.asarray(ctc_logits)[b, :np.asarray(ctc_lengths)[b]]]
            weights = [sum(of_class) for of_class in zip(*map(posteriors, frames), strict=True)]
        mixed = sum(weights) // (99 * V) if correction and proposal != "uniform" else 0
        kept = {blank % V, *(int(v) for b in batch for v in labels[b, :lengths[b]])}
        low, high = step % 2**32, step % 2**63 >> 32
        first, second, _, _ = philox(seed % 2**63, (0, row, low, high))
        places = order(V, philox(seed % 2**63, (1, row, low, high)))
        picked, chance = draw([w + mixed for w in weights], kept, slots - len(kept), first << 32 | second, places)
        ids.append([blank % V, *sorted((kept | picked) - {blank % V})])
        probability.append(chance)
    shape = (len(batches),) if scope == "utterance" else ()
    return np.reshape(np.array(ids, np.int64), (*shape, slots)), np.reshape(np.array(probability, object), (*shape, V))


def inclusion_probabilities(weights: ArrayLike, kept: Collection[int], number: int) -> F8:
    """Probability of every class to be taken, where `number` are drawn by weight from those not kept anyway.

    That is ``number * w / sum(w)``; where this is 1 or more, the class is certain, and the others share what is left of
    the number. If nothing with a weight is left, all others are alike.

    Parameters
    ----------
    weights : array_like, float, shape (V,)
        At least 0.
    kept : set or list of int
        Classes of probability 1 beforehand.
    number : int
        How many others there are to be, at most as many as there are.

    Returns
    -------
    ndarray, float64, shape (V,)

    Examples
    --------
    >>> inclusion_probabilities([9, 1, 2, 1, 0], [0], 2)  # class 2 would be drawn with probability 2 * 2 / 4
    array([1. , 0.5, 1. , 0.5, 0. ])
    """
    w = np.array(weights, np.float64)
    probability = np.zeros(len(w))
    probability[list(kept)] = 1.0
    left = [v for v in range(len(w)) if v not in kept]
    while number > 0:
        if not w[left].any():
            w[left] = 1.0
        share = number * w[left] / math.fsum(w[left])
        probability[left] = np.minimum(share, 1.0)
        number -= int((share >= 1.0).sum())
        if not (share >= 1.0).any():
            break
        left = [v for v, p in zip(left, share, strict=True) if p < 1.0]
    return probability


def draw(weights: Sequence[int], kept: Collection[int], number: int, random: int,
         places: Sequence[int]) -> tuple[set[int], list[Fraction]]:
    """Systematic sampling of `number` classes in the order of `places`, and every class's probability.

    Examples
    --------
    Marks at 5, 15, ... on a line of pieces of 3, 1, 2 and 4, twice as long each for two to be drawn:

    >>> draw([3, 1, 2, 4], [], 2, 5, range(4))[0] == {0, 3}
    True
    """
    probability = [Fraction(int(v in kept)) for v in range(len(weights))]
    picked: set[int] = set()
    left = {v: w for v, w in enumerate(weights) if v not in kept}
    while number > 0:
        total, positive = sum(left.values()), sum(w > 0 for w in left.values())
        least = -(-total // number) if positive > number else 1
        certain = {v for v, w in left.items() if w >= least}
        if positive == 0:
            left = dict.fromkeys(left, 1)
        elif certain:
            picked |= certain
            left = {v: w for v, w in left.items() if v not in certain}
            number -= len(certain)
        elif total >= 2**39:  # no room in the kernels' integers; what has a weight keeps one
            left = {v: max(w >> total.bit_length() - 39, min(w, 1)) for v, w in left.items()}
        else:
            break
    for v in picked:
        probability[v] = Fraction(1)
    if number > 0:
        r = random % total
        for v in places:
            if v in left:
                probability[v] = Fraction(number * left[v], total)
                r += number * left[v]
                if r >= total:
                    r -= total
                    picked.add(v)
    return picked, probability


def count_weights(counts: ArrayLike) -> list[int]:
    """Counts times the power of two that brings the largest into [2^39, 2^40), rounded down, but to 1 at least.

    Examples
    --------
    >>> [w / 2**39 for w in count_weights([3, 4, 0])]
    [0.75, 1.0, 0.0]
    """
    numbers = [float(count) for count in np.asarray(counts)]
    power = min(40 - math.frexp(max(numbers))[1], 1023)
    return [max(int(math.ldexp(count, power)), int(count > 0)) for count in numbers]


def posteriors(logits: ArrayLike) -> list[int]:
    """Softmax of a frame in units of 2^-36: all 0 where the largest logit is no number that differences can be formed with.

    Examples
    --------
    >>> [p / 2**36 for p in posteriors([0.0, float("nan"), 0.0])]
    [0.5, 0.0, 0.5]
    """
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.asarray(logits).astype(np.float32)
        distances = np.fmax.reduce(x, initial=-np.inf) - x
    exponentials = [fixed_exponential(distance) for distance in distances]
    total = sum(exponentials)
    share = min(2**63 // total, 2**32 - 1) if total > 0 else 0
    return [e * share >> 27 for e in exponentials]


def fixed_exponential(distance: float | np.float32) -> int:
    """2^31 exp(-distance): the product is rounded to float32, all after it is integers.

    Examples
    --------
    >>> [round(fixed_exponential(distance) / 2**31, 6) for distance in (0.0, 1.0, float("inf"))]
    [1.0, 0.367879, 0.0]
    """
    with np.errstate(over="ignore"):
        binary = np.float32(distance) * np.float32(12102203.0)  # log2(e) 2^23
    if not binary < 31 * 2**23:
        return 0
    halvings, fraction = divmod(int(binary), 2**23)
    p, g = 0, fraction << 9
    for coefficient in (4316630, 40176172, 238031838, 1031733117, 2977044471):
        p = coefficient - (g * p >> 32)
    return 2**31 - (g * p >> 33) >> halvings


def order(number: int, words: Sequence[int]) -> list[int]:
    """The numbers below `number` in an order made of random words.

    Sums, odd products and shifts are bijections of the numbers below a power of two. Whoever is led to `number` or beyond
    goes on, until it comes back: at the latest to where it started.

    Examples
    --------
    >>> order(5, (1, 2, 3, 4))
    [4, 1, 3, 2, 0]
    """
    bits = max((number - 1).bit_length(), 1)
    half, mask = (bits + 1) // 2, 2**bits - 1

    def chase(x: int) -> Iterator[int]:
        while True:
            x = x + words[0] & mask
            x ^= x >> half
            for word in words[1:]:
                x = x * (word | 1) + (word >> 16) & mask
                x ^= x >> half
            yield x

    return [next(x for x in chase(place) if x < number) for place in range(number)]


def philox(key: int, counter: Sequence[int]) -> list[int]:
    """Four random words of 32 bits (Philox 4x32-10; Salmon et al., Parallel random numbers: as easy as 1, 2, 3).

    Examples
    --------
    >>> [f"{word:08x}" for word in philox(0, (0, 0, 0, 0))]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    k0, k1 = key % 2**32, key >> 32
    c0, c1, c2, c3 = counter
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 % 2**32, p0 >> 32 ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]
