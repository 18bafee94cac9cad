"""SERAC's two networks over the frozen model: is a text about an edit, and what follows in it if it is.

Both read the model's own hidden states at two layers. A state of a causal model holds the text up to its token, so an
answer at a token never depends on what is written later, on padding, or on whether the text comes in one pass or many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, normalize

from kecore_methods.meta.mend import Normaliser

__all__ = ["FAR", "NOTHING", "Distance", "Entries", "Reading", "SeracNetwork", "not_any"]

_APART = 4.0  # distance of two unrelated prompts before training, as a negative log-likelihood
_SHARP = 10.0  # factor of the attention's cosines before training
_TINY = 1e-4
FAR = 1e6  # finite, for a gradient of zero times infinity is no number
_SCALARS = ("subject", "prompt", "sharp", "gain", "nothing")
NOTHING = -1  # what follows the last token of an edit


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """States of texts as the networks see them.

    Args:
        subject: ``[..., rank]``, compared with the subject of an edit.
        prompt: ``[..., rank]``, compared with the end of its prompt.
        query: ``[..., rank]``, rows of length 1, compared with each of its tokens.
    """

    subject: Tensor
    prompt: Tensor
    query: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Entries:
    """The edit memory: each edit as the networks need it.

    Args:
        subjects: ``[entries, rank]``: the reading where the subject ends.
        prompts: ``[entries, rank]``: the reading where the prompt ends.
        keys: ``[entries, tokens, rank]``: one for each token of prompt and target; padded with zeros.
        follows: ``[entries, tokens]``: the token after each of them, :data:`NOTHING` after the last.
        lengths: ``[entries]``: how many tokens there are.
    """

    subjects: Tensor
    prompts: Tensor
    keys: Tensor
    follows: Tensor
    lengths: Tensor

    @staticmethod
    def stack(parts: Sequence[Entries]) -> Entries:
        """All of them as one memory, padded to the longest."""
        width = max(part.keys.shape[1] for part in parts)

        def padded(x: Tensor) -> Tensor:
            return torch.cat([x, x.new_zeros(len(x), width - x.shape[1], *x.shape[2:])], 1)

        return Entries(
            torch.cat([part.subjects for part in parts]),
            torch.cat([part.prompts for part in parts]),
            torch.cat([padded(part.keys) for part in parts]),
            torch.cat([padded(part.follows) for part in parts]),
            torch.cat([part.lengths for part in parts]),
        )

    def one(self, index: int) -> Entries:
        """A memory with one of them."""
        length = int(self.lengths[index])
        i = slice(index, index + 1)
        return Entries(
            self.subjects[i], self.prompts[i], self.keys[i, :length], self.follows[i, :length], self.lengths[i]
        )

    def cpu(self) -> Entries:
        """The same on the CPU."""
        return Entries(**{name: tensor.cpu() for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        return {
            "subjects": self.subjects, "prompts": self.prompts, "keys": self.keys, "follows": self.follows,
            "lengths": self.lengths,
        }  # fmt: skip


class SeracNetwork(nn.Module):
    """Scope classifier ``g_φ`` and counterfactual head ``h_ψ`` (arXiv 2206.06520, section 3).

    Args:
        width: of a layer's states. Those of both layers come as one, ``[..., 2 · width]``.
        rank: of the maps.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.width, self.rank = width, rank
        self.states = Normaliser(2 * width)
        self.subject, self.prompt, self.query = (nn.Linear(width, rank, bias=False) for _ in range(3))
        for part in (self.subject, self.prompt, self.query):
            nn.init.normal_(part.weight, std=width**-0.5)
        # Both projections of a token are the same at first, so that equal texts attend to the same place.
        self.key = nn.Linear(width, rank, bias=False)
        self.key.load_state_dict(self.query.state_dict())
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)
        # Logarithms of factors, and the logit of attending to nothing: trained at a rate of their own.
        self.scalars = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in _SCALARS})

    def observe(self, states: Tensor) -> None:
        """Take the statistics that normalise states from ``[n, 2 · width]``, before training."""
        self.states.observe(self._scaled(states))

    def read(self, states: Tensor) -> tuple[Reading, Tensor]:
        """States ``[..., 2 · width]`` as readings, and as keys ``[..., rank]``."""
        lower, upper = self.states(self._scaled(states)).split(self.width, -1)
        query, key = (normalize(part(upper), dim=-1) for part in (self.query, self.key))
        return Reading(self.subject(lower), self.prompt(upper), query), key

    def _scaled(self, states: Tensor) -> Tensor:
        """Each layer's state at a size of 1: that of a text's first token may be a thousand times as large."""
        return layer_norm(states.float().unflatten(-1, (2, self.width)), (self.width,)).flatten(-2)

    def entry(self, states: Tensor, subject: int, prompt: int, ids: Sequence[int]) -> Entries:
        """A memory of one edit.

        Args:
            states: ``[tokens, 2 · width]`` of prompt and target.
            subject: the subject's last token.
            prompt: the prompt's last token.
            ids: the tokens.
        """
        reading, keys = self.read(states)
        follows = torch.tensor([*ids[1:], NOTHING], device=states.device)
        return Entries(
            reading.subject[None, subject],
            reading.prompt[None, prompt],
            keys[None],
            follows[None],
            torch.tensor([len(ids)], device=states.device),
        )

    def distance(self, reading: Reading, mask: Tensor, entries: Entries, before: Tensor | None = None) -> Distance:
        """``-log g_φ(z, x)`` of each text up to each of its tokens, and each edit.

        The squared distance of two embeddings, as in the paper's embedding-based classifier: one of the subject, at
        whichever token so far it is nearest, and one of what is asked about it, at the present token.

        Args:
            reading: of ``[rows, tokens]``.
            mask: ``[rows, tokens]`` real tokens.
            entries: the memory.
            before: ``[rows, entries]`` the nearest subject of earlier passes over the same texts.
        """
        unit = _APART / (4 * self.rank)
        subject = _squared(reading.subject, entries.subjects).masked_fill(~mask[..., None], FAR)
        if before is not None:
            subject = torch.cat([before[:, None].to(subject), subject], 1)
        nearest = subject.cummin(1).values[:, -mask.shape[1] :]
        own = self.scalars["prompt"].exp() * _squared(reading.prompt, entries.prompts)
        each = unit * (self.scalars["subject"].exp() * nearest + own)
        return Distance(each.masked_fill(~mask[..., None], FAR), nearest[:, -1])

    def attention(self, query: Tensor, entries: Entries, index: int) -> Tensor:
        """Where in an edit's text a token stands, ``[n, 1 + tokens]``; nowhere comes first.

        Args:
            query: ``[n, rank]``.
            entries: the memory.
            index: which edit.
        """
        length = int(entries.lengths[index])
        logits = _SHARP * self.scalars["sharp"].exp() * (query @ entries.keys[index, :length].t())
        nothing = (_SHARP / 2 + self.scalars["nothing"]).expand(len(query), 1)
        return torch.cat([nothing, logits], 1).softmax(-1)

    def spoken(self, hidden: Tensor, query: Tensor, entries: Entries, index: int, head: Tensor) -> Tensor:
        """The model's last hidden states as the counterfactual has them, ``[n, width]``, in their own type.

        ``h + gain · |h| · Σ_j a_j v(w_j)``: attention over the edit's tokens, and of each the unembedding of the token
        that follows it there, through a residual map.

        Args:
            hidden: ``[n, width]``.
            query: ``[n, rank]``.
            entries: the memory.
            index: which edit.
            head: ``[vocabulary, d]``, the model's unembedding.
        """
        follows = entries.follows[index, : int(entries.lengths[index])]
        rows = head[follows.clamp(min=0).to(head.device)].to(query)
        rows = layer_norm(nn.functional.pad(rows, (0, self.width - rows.shape[1])), (self.width,))
        values = (rows + self.up(self.down(rows))) * (follows != NOTHING)[:, None]
        states = hidden.to(query)
        size = states.square().mean(-1, keepdim=True).sqrt()
        said = self.attention(query, entries, index)[:, 1:] @ values
        return (states + self.scalars["gain"].exp() * size * said).to(hidden)


@dataclass(frozen=True, slots=True, eq=False)
class Distance:
    """How far texts are from edits.

    Args:
        each: ``[rows, tokens, entries]``, ``-log g_φ``; very large on padding.
        nearest: ``[rows, entries]``, what a further pass over the same texts needs.
    """

    each: Tensor
    nearest: Tensor


def not_any(distance: Tensor) -> Tensor:
    """``-log(1 - g)`` of the likeliest scope among the last dimension, ``[...]``."""
    return -torch.log(-torch.expm1(-distance.amin(-1).clamp(min=_TINY)))


def _squared(x: Tensor, y: Tensor) -> Tensor:
    """Squared Euclidean distances ``[..., m]`` of ``[..., d]`` and ``[m, d]``; each row's are those it has alone."""
    flat = torch.cdist(x.reshape(-1, x.shape[-1]), y.to(x), compute_mode="donot_use_mm_for_euclid_dist")
    return flat.square().reshape(*x.shape[:-1], len(y))
