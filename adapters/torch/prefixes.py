"""PyTorch: a step of the beam search, which takes the prefixes of a batch of utterances over one frame."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from transducer_loss.adapters.torch.search import Search

# An odd multiplier that mixes well (Knuth's MMIX); hashes only say which prefixes to compare label by label.
_MULTIPLIER = 6364136223846793005


class Prefixes(NamedTuple):
    """S prefixes of each of B utterances. Those with a score above -inf are different ones."""

    labels: Tensor
    """(B, S, L), -1 past the lengths; L is at least 1."""
    lengths: Tensor
    hashes: Tensor
    """(B, S): of the labels."""
    stems: Tensor
    """(B, S): of the labels but the last."""
    rows: Tensor
    """(B, S): where the search has what the predictor made of them."""
    scores: Tensor

    def taken(self, order: Tensor) -> Prefixes:
        """Those at positions (B, n)."""
        return Prefixes(*(each.take_along_dim(order[..., None] if each.ndim == 3 else order, 1) for each in self))

    def followed_by(self, other: Prefixes) -> Prefixes:
        """These and then those."""
        return Prefixes(*(torch.cat(both, 1) for both in zip(self, other, strict=True)))

    def with_children(self, parents: Tensor, label: Tensor, scores: Tensor) -> tuple[Prefixes, Prefixes]:
        """These, with room for a label more, and children (B, n); a child's row is still its parent's."""
        labels = self.labels
        if int(self.lengths.max()) == labels.shape[2]:
            labels = torch.nn.functional.pad(labels, (0, 1), value=-1)
        these = self._replace(labels=labels)
        of = these.taken(parents)
        labels = of.labels.scatter(2, of.lengths[..., None], label[..., None])
        return these, Prefixes(labels, of.lengths + 1, of.hashes * _MULTIPLIER + label + 1, of.hashes, of.rows, scores)

    def families(self, parents: Tensor, children: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Utterance, prefix, the same prefix with a label more, and that label, of all such pairs of some and others (B, S)."""
        likely = (self.hashes[:, :, None] == self.stems[:, None]) & parents[:, :, None] & children[:, None]
        at, parent, child = likely.nonzero(as_tuple=True)
        whole, last = self.labels[at, child], self.lengths[at, child] - 1
        same = (self.labels[at, parent] == whole.scatter(1, last.clamp(min=0)[:, None], -1)).all(1)
        same &= self.lengths[at, parent] == last
        at, parent, child = at[same], parent[same], child[same]
        return at, parent, child, self.labels[at, child, last[same]]


def advance(search: Search, prefixes: Prefixes, frame: int, width: int) -> Prefixes:
    """The `width` best prefixes that leave a frame, of those that came to it."""
    running = (search.lengths > frame)[:, None]
    alive = running & (prefixes.scores > -math.inf)
    if not alive.any():
        return prefixes
    log_probs = _cells(search, prefixes, alive, frame)
    scores = prefixes.scores.to(log_probs.dtype)
    arrived = scores.masked_fill(~alive, -math.inf)
    leaving = torch.where(running, arrived + log_probs[..., search.blank], scores)
    for _ in range(search.max_symbols):
        arrived, best, parents, label = _onward(prefixes, alive, arrived, log_probs, search.blank, width)
        leaving = leaving.logaddexp(arrived if search.modified else arrived + log_probs[..., search.blank])
        rivals = torch.cat([leaving, best], 1) if search.modified else leaving
        if rivals.shape[1] >= width:
            best.masked_fill_(best < rivals.topk(width).values[:, -1:], -math.inf)
        new = best > -math.inf
        most = int(new.sum(1).max())
        if most:
            new, best, label = new[:, :most], best[:, :most], label[:, :most]
            prefixes, children = prefixes.with_children(parents[:, :most], label, best)
            children.rows[new] = search.extend(children.rows[new], label[new])
            prefixes, alive, arrived = prefixes.followed_by(children), torch.cat([alive, new], 1), torch.cat([arrived, best], 1)
            if search.modified:
                leaving = torch.cat([leaving, best], 1)
            else:
                log_probs = torch.cat([log_probs, _cells(search, children, new, frame)], 1)
                leaving = torch.cat([leaving, best + log_probs[:, -most:, search.blank]], 1)
        elif not (arrived > -math.inf).any():
            break
    scores, order = largest(leaving, width)
    return prefixes.taken(order)._replace(scores=scores)


def _onward(
    prefixes: Prefixes, alive: Tensor, arrived: Tensor, log_probs: Tensor, blank: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What label arcs bring, from scores that have just arrived at prefixes.

    To the prefixes themselves (B, S), and to the likeliest (B, n) of the others, with their parents and labels.
    """
    sources = arrived > -math.inf
    at, which = sources.nonzero(as_tuple=True)
    place = sources.cumsum(1) - 1  # of a prefix among the sources of its utterance
    row = torch.zeros_like(place)
    row[at, which] = torch.arange(len(at), device=at.device)
    onward = log_probs[at, which]
    onward[:, blank] = -math.inf
    of, parent, child, label = prefixes.families(sources, alive)
    known = torch.full_like(arrived, -math.inf)
    known[of, child] = arrived[of, parent] + onward[row[of, parent], label]
    onward[row[of, parent], label] = -math.inf
    values, labels = largest(onward, width)
    padded = len(arrived), int(place.max()) + 1, values.shape[1]
    scores, likely, parents = values.new_full(padded, -math.inf), labels.new_zeros(padded), labels.new_zeros(padded)
    scores[at, place[at, which]] = values + arrived[at, which, None]
    likely[at, place[at, which]] = labels
    parents[at, place[at, which]] = which[:, None]
    best, index = largest(scores.flatten(1), width)
    return known, best, parents.flatten(1).gather(1, index), likely.flatten(1).gather(1, index)


def _cells(search: Search, prefixes: Prefixes, alive: Tensor, frame: int) -> Tensor:
    """Log-probabilities (B, S, V) of the prefixes that are alive in a frame; -inf for the others, and for NaN."""
    at, which = alive.nonzero(as_tuple=True)
    log_probs = search.log_probs(frame, at, prefixes.rows[at, which])
    wrong = ~(log_probs < math.inf)
    search.broken[at[wrong.any(1)]] = True
    result = log_probs.new_full((*alive.shape, log_probs.shape[1]), -math.inf)
    result[at, which] = log_probs.masked_fill(wrong, -math.inf)
    return result


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, or all, and where they are, largest first, of equals the lower position."""
    count = min(count, values.shape[1])
    least = values.topk(count).values[:, -1:]
    above, equal = values > least, values == least
    # topk takes any of the equals.
    chosen = above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))
    index = chosen.nonzero()[:, 1].view(-1, count)
    index = index.gather(1, values.gather(1, index).sort(dim=1, descending=True, stable=True).indices)
    return values.gather(1, index), index
