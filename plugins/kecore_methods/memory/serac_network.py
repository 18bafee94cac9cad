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

from kecore.engine.normaliser import Normaliser

__all__ = ["FAR", "NOTHING", "Distance", "Entries", "Reading", "SeracNetwork", "not_any"]

_APART = 4.0  # distance of two unrelated prompts before training, as a negative log-likelihood
_SHARPNESS = 10.0  # factor of the attention's cosines before training
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
        lengths: ``[entries]``: number of tokens of prompt and target.
    """

    subjects: Tensor
    prompts: Tensor
    keys: Tensor
    follows: Tensor
    lengths: Tensor

    @staticmethod
    def stack(memories: Sequence[Entries]) -> Entries:
        """Return the entries of all memories as one, padded to the longest."""
        width = max(memory.keys.shape[1] for memory in memories)

        def pad(x: Tensor) -> Tensor:
            """Return ``[entries, tokens, ...]`` with ``width`` tokens."""
            return torch.cat([x, x.new_zeros(len(x), width - x.shape[1], *x.shape[2:])], 1)

        return Entries(
            subjects=torch.cat([memory.subjects for memory in memories]),
            prompts=torch.cat([memory.prompts for memory in memories]),
            keys=torch.cat([pad(memory.keys) for memory in memories]),
            follows=torch.cat([pad(memory.follows) for memory in memories]),
            lengths=torch.cat([memory.lengths for memory in memories]),
        )

    def one(self, index: int) -> Entries:
        """Return a memory with one of the entries, without padding."""
        length = int(self.lengths[index])
        entry = slice(index, index + 1)
        return Entries(
            subjects=self.subjects[entry],
            prompts=self.prompts[entry],
            keys=self.keys[entry, :length],
            follows=self.follows[entry, :length],
            lengths=self.lengths[entry],
        )

    def cpu(self) -> Entries:
        """Return the same on the CPU."""
        return Entries(**{name: tensor.cpu() for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        return {
            "subjects": self.subjects,
            "prompts": self.prompts,
            "keys": self.keys,
            "follows": self.follows,
            "lengths": self.lengths,
        }


class SeracNetwork(nn.Module):
    """Scope classifier ``g_φ`` and counterfactual head ``h_ψ`` (arXiv 2206.06520, section 3).

    Args:
        width: of one layer's states. The states of both layers come as one, ``[..., 2 · width]``.
        rank: of the maps.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.width, self.rank = width, rank
        self.states = Normaliser(2 * width)
        self.subject, self.prompt, self.query = (nn.Linear(width, rank, bias=False) for _ in range(3))
        for linear in (self.subject, self.prompt, self.query):
            nn.init.normal_(linear.weight, std=width**-0.5)
        # Both projections of a token are the same at first, so that a token attends to its equal in an edit's text.
        self.key = nn.Linear(width, rank, bias=False)
        self.key.load_state_dict(self.query.state_dict())
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)
        # Logarithms of factors, and the logit of attending to nothing: trained at a rate of their own.
        self.scalars = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in _SCALARS})

    def observe(self, states: Tensor) -> None:
        """Take the statistics that normalise states from ``[n, 2 · width]``, before training."""
        self.states.observe(self._scale(states))

    def read(self, states: Tensor) -> tuple[Reading, Tensor]:
        """Return states ``[..., 2 · width]`` as readings, and as keys ``[..., rank]``."""
        lower, upper = self.states(self._scale(states)).split(self.width, -1)
        query = normalize(self.query(upper), dim=-1)
        key = normalize(self.key(upper), dim=-1)
        return Reading(self.subject(lower), self.prompt(upper), query), key

    def _scale(self, states: Tensor) -> Tensor:
        """Return each layer's state at a size of 1: that of a text's first token may be a thousand times as large."""
        by_layer = states.float().unflatten(-1, (2, self.width))  # [..., 2, width]
        return layer_norm(by_layer, (self.width,)).flatten(-2)

    def entry(self, states: Tensor, subject: int, prompt: int, ids: Sequence[int]) -> Entries:
        """Return a memory of one edit.

        Args:
            states: ``[tokens, 2 · width]`` of prompt and target.
            subject: column of the subject's last token.
            prompt: column of the prompt's last token.
            ids: the tokens.
        """
        reading, keys = self.read(states)
        follows = torch.tensor([*ids[1:], NOTHING], device=states.device)
        return Entries(
            subjects=reading.subject[None, subject],
            prompts=reading.prompt[None, prompt],
            keys=keys[None],
            follows=follows[None],
            lengths=torch.tensor([len(ids)], device=states.device),
        )

    def distance(self, reading: Reading, mask: Tensor, entries: Entries, before: Tensor | None = None) -> Distance:
        """Return ``-log g_φ(z, x)`` of each text up to each of its tokens, and each edit.

        It is the squared distance of two embeddings, as in the paper's embedding-based classifier: one of the subject,
        at whichever token so far it is nearest, and one of what is asked about it, at the present token.

        Args:
            reading: of ``[rows, tokens]``.
            mask: ``[rows, tokens]`` real tokens.
            entries: the memory.
            before: ``[rows, entries]`` the nearest subject of earlier passes over the same texts.
        """
        unit = _APART / (4 * self.rank)
        subject = _squared_distance(reading.subject, entries.subjects)  # [rows, tokens, entries]
        subject = subject.masked_fill(~mask[..., None], FAR)
        if before is not None:
            subject = torch.cat([before[:, None].to(subject), subject], 1)
        nearest = subject.cummin(1).values[:, -mask.shape[1] :]
        prompt = self.scalars["prompt"].exp() * _squared_distance(reading.prompt, entries.prompts)
        distance = unit * (self.scalars["subject"].exp() * nearest + prompt)
        return Distance(distance.masked_fill(~mask[..., None], FAR), nearest[:, -1])

    def attention(self, query: Tensor, entries: Entries, index: int) -> Tensor:
        """Return where in an edit's text a token stands, ``[n, 1 + tokens]``; nowhere comes first.

        Args:
            query: ``[n, rank]``.
            entries: the memory.
            index: index of the edit.
        """
        length = int(entries.lengths[index])
        logits = _SHARPNESS * self.scalars["sharp"].exp() * (query @ entries.keys[index, :length].t())  # [n, tokens]
        nowhere = (_SHARPNESS / 2 + self.scalars["nothing"]).expand(len(query), 1)
        return torch.cat([nowhere, logits], 1).softmax(-1)

    def counterfactual(self, hidden: Tensor, query: Tensor, entries: Entries, index: int, head: Tensor) -> Tensor:
        """Return the model's last hidden states as the edit would have them, ``[n, width]``, in their own type.

        ``h + gain · |h| · Σ_j a_j v(w_j)``: attention over the edit's tokens, where the value of a token is the
        unembedding of the token that follows it there, through a residual map.

        Args:
            hidden: ``[n, width]``.
            query: ``[n, rank]``.
            entries: the memory.
            index: index of the edit.
            head: ``[vocabulary, d]``, the model's unembedding.
        """
        follows = entries.follows[index, : int(entries.lengths[index])]  # [tokens]
        rows = head[follows.clamp(min=0).to(head.device)].to(query)  # [tokens, d]
        rows = nn.functional.pad(rows, (0, self.width - rows.shape[1]))  # d may be below width
        rows = layer_norm(rows, (self.width,))
        values = (rows + self.up(self.down(rows))) * (follows != NOTHING)[:, None]  # [tokens, width]
        states = hidden.to(query)
        size = states.square().mean(-1, keepdim=True).sqrt()  # [n, 1]
        attended = self.attention(query, entries, index)[:, 1:] @ values  # [n, width]; nowhere adds nothing
        return (states + self.scalars["gain"].exp() * size * attended).to(hidden)


@dataclass(frozen=True, slots=True, eq=False)
class Distance:
    """Distances of texts from edits.

    Args:
        each: ``[rows, tokens, entries]``, ``-log g_φ`` of each edit; very large on padding.
        nearest: ``[rows, entries]``, the nearest subject so far, which a further pass over the same texts needs.
    """

    each: Tensor
    nearest: Tensor


def not_any(distance: Tensor) -> Tensor:
    """Return ``-log(1 - g)`` of the likeliest scope among the last dimension, ``[...]``."""
    return -torch.log(-torch.expm1(-distance.amin(-1).clamp(min=_TINY)))


def _squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """Return squared Euclidean distances ``[..., m]`` of ``[..., d]`` and ``[m, d]``.

    By differences and not by a matrix product, so that no row's rounding depends on the other rows.
    """
    flat = torch.cdist(x.reshape(-1, x.shape[-1]), y.to(x), compute_mode="donot_use_mm_for_euclid_dist")  # [n, m]
    return flat.square().reshape(*x.shape[:-1], len(y))
