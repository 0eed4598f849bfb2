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

    def families(self, alive: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Utterance, prefix, the same prefix with a label more, and that label, of all such pairs."""
        likely = (self.hashes[:, :, None] == self.stems[:, None]) & alive[:, :, None] & alive[:, None]
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
    arrived = prefixes.scores.masked_fill(~alive, -math.inf)
    leaving = torch.where(running, arrived + log_probs[..., search.blank], prefixes.scores)
    for _ in range(search.max_symbols):
        onward = arrived[..., None] + log_probs
        onward[..., search.blank] = -math.inf
        at, parent, child, label = prefixes.families(alive)
        arrived = torch.full_like(arrived, -math.inf)
        arrived[at, child] = onward[at, parent, label]
        onward[at, parent, label] = -math.inf
        leaving = leaving.logaddexp(arrived if search.modified else arrived + log_probs[..., search.blank])
        best, index = largest(onward.flatten(1), width)
        rivals = torch.cat([leaving, best], 1) if search.modified else leaving
        if rivals.shape[1] >= width:
            best.masked_fill_(best < rivals.topk(width).values[:, -1:], -math.inf)
        new = best > -math.inf
        most = int(new.sum(1).max())
        if not most:
            if not (arrived > -math.inf).any():
                break
            continue
        new, best, index = new[:, :most], best[:, :most], index[:, :most]
        parents, label = index // log_probs.shape[2], index % log_probs.shape[2]
        prefixes, children = prefixes.with_children(parents, label, best)
        children.rows[new] = search.extend(children.rows[new], label[new])
        prefixes, alive, arrived = prefixes.followed_by(children), torch.cat([alive, new], 1), torch.cat([arrived, best], 1)
        if search.modified:
            leaving = torch.cat([leaving, best], 1)
        else:
            log_probs = torch.cat([log_probs, _cells(search, children, new, frame)], 1)
            leaving = torch.cat([leaving, best + log_probs[:, -most:, search.blank]], 1)
    scores, order = largest(leaving, width)
    return prefixes.taken(order)._replace(scores=scores)


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
