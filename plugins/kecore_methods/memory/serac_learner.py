"""How SERAC's two networks are trained: texts that are in an edit's scope, texts that are not, and what follows."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kecore.api.errors import DataFormatError
from kecore.api.method import MethodContext
from kecore.api.types import EditRecord, EditRequest
from kecore.model import ModelView
from kecore.text import Encoded
from kecore.training import module_state, restore_module
from kecore_methods.memory.serac_network import FAR, Entries, SeracNetwork, not_any

__all__ = ["SeracLearner"]

_OBSERVED = 32  # records that normalisation takes its statistics from
_TOGETHER = 16  # wordings whose logits are held at a time


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """A record as the unedited model reads it.

    Args:
        request: the edit.
        wordings: its prompt and rephrases, each with the target and, where it can be told from it, a full
            stop and an unrelated text behind it.
        ends: of each of them where the target ends.
        states: of the wordings and then of texts out of scope, ``[tokens, 2 · width]`` each, at both layers.
        below: what enters the last layer, of the wordings; empty where that is the model's first.
    """

    request: EditRequest
    wordings: list[Encoded]
    ends: list[int]
    states: list[Tensor]
    below: list[Tensor]

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.states, *self.below))


class SeracLearner:
    """Trains both networks at once; they share no parameter, so each has the loss that it has alone.

    The scope classifier: binary cross-entropy of ``β(x) = max g(z, x)`` over the edits of a batch (arXiv 2206.06520,
    section 3.2). In scope are prompt and rephrases of an edit; out of it are its locality probes, its own prompt about
    another subject, another prompt about its own subject, and all wordings of the other edits. The counterfactual
    head: negative log-likelihood of the target behind each wording, given the edit, and of silence behind the target.

    Args:
        network: both.
        layers: both layers that are read.
        view: the model.
        records: what is trained on.
        context: configuration and tokenizer.
    """

    def __init__(
        self,
        network: SeracNetwork,
        layers: tuple[int, int],
        view: ModelView,
        records: Sequence[EditRecord],
        context: MethodContext,
    ) -> None:
        self.config: Any = context.config
        self.network, self.view, self.layers, self.encoder = network, view, layers, context.encoder
        self.requests = [record.request for record in records]
        self._kept: dict[Hashable, _Prepared] = {}
        self._room = context.memory // 2
        observed = [self._prepared(record) for record in records[:_OBSERVED]]
        network.observe(torch.cat([state for part in observed for state in part.states]))
        scalars = list(network.scalars.parameters())
        others = [p for p in network.parameters() if all(p is not scalar for scalar in scalars)]
        groups = [
            {"params": others, "lr": self.config.learning_rate},
            {"params": scalars, "lr": self.config.scalar_learning_rate},
        ]
        self.optimizer = torch.optim.Adam(groups)

    def step(self, records: Sequence[EditRecord]) -> float:
        """One update of both networks."""
        parts = [self._prepared(record) for record in records]
        with torch.enable_grad():
            batch = _Batch(self.network, parts)
            loss = batch.scope_loss() + self._answers(batch, batch.owner).loss + batch.silence_loss()
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self, records: Sequence[EditRecord]) -> dict[str, float]:
        """Losses, and what comes of it with all of these records' edits in one memory.

        The share of the targets' tokens that are said, behind prompts and behind rephrases (teacher-forced; by the
        model itself where no edit is in scope, and after a wrong edit where the wrong one is), of rephrases that are
        taken for the right edit, and of texts that are in no edit's scope and stay out.
        """
        batch = _Batch(self.network, [self._prepared(record) for record in records])
        least, nearest = batch.at_prompt_end().min(-1)
        inside = (-least).exp() >= self.config.threshold
        taken = torch.where(inside, nearest, -1)
        gold = self._answers(batch, batch.owner)
        said = self._answers(batch, taken.tolist()).right
        first = torch.tensor([i == 0 or batch.owner[i - 1] != own for i, own in enumerate(batch.owner)])
        right = (taken.cpu() == torch.tensor(batch.owner)).float()
        scope = float(batch.scope_loss())
        figures = {
            "loss": scope + float(gold.loss) + float(batch.silence_loss()),
            "scope loss": scope,
            "answer loss": float(gold.loss),
            "edit accuracy": float(said[first].mean()),
        }
        if not bool(first.all()):
            figures["rephrase accuracy"] = float(said[~first].mean())
            figures["rephrases in scope"] = float(right[~first].mean())
        return {**figures, "kept out": float((batch.others_scope() < self.config.threshold).float().mean())}

    def state(self) -> Mapping[str, Tensor]:
        """Both networks with the statistics of states, and Adam's moments."""
        return module_state(self.network, self.optimizer)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        restore_module(self.network, self.optimizer, state)

    def tensors(self) -> Mapping[str, Tensor]:
        """Both networks."""
        return self.network.state_dict()

    def _answers(self, batch: _Batch, edits: Sequence[int]) -> _Answers:
        """What follows each wording where the edit of that place in the memory is in force, -1 for none."""
        losses: list[Tensor] = []
        right: list[Tensor] = []
        for begin in range(0, len(edits), _TOGETHER):
            chosen = range(begin, min(begin + _TOGETHER, len(edits)))
            logits, row, token = self._logits(batch, chosen, edits)
            count = torch.bincount(row, minlength=len(chosen))
            for values, to in (
                (nn.functional.cross_entropy(logits, token, reduction="none"), losses),
                ((logits.argmax(-1) == token).float(), right),
            ):
                to.append(values.new_zeros(len(chosen)).index_add(0, row, values) / count)
        return _Answers(torch.cat(losses).mean(), torch.cat(right).cpu())

    def _logits(self, batch: _Batch, chosen: range, edits: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the targets' tokens ``[places, vocabulary]`` float32, whose wording each is, and the tokens."""
        view, head = self.view, self.view.unembedding
        weight: Any = head.weight
        rows = self.encoder.rows([batch.wordings[i].ids for i in chosen]).to(view.device)
        below = [batch.below[i] for i in chosen if batch.below]
        last = len(view.layers) - 1
        places = [
            (r, j - 1, batch.wordings[i].ids[j])
            for r, i in enumerate(chosen)
            for j in range(batch.wordings[i].start, batch.ends[i])
        ]
        row, column, token = torch.tensor(places, device=view.device).t()

        def speak(hidden: Tensor) -> Tensor:
            width = hidden.shape[1]
            said = [
                self.network.spoken(hidden[r], batch.query[i, :width], batch.memory, edits[i], weight)
                if edits[i] >= 0
                else hidden[r]
                for r, i in enumerate(chosen)
            ]
            return torch.stack(said)

        out = view.forward(
            rows,
            resume=(last, pad_sequence(below, batch_first=True)) if below else None,
            change={view.layers[last].module: speak},
            at=(row, column),
        )
        return out.logits.float(), row, token  # type: ignore[union-attr]

    def _prepared(self, record: EditRecord) -> _Prepared:
        """What the unedited model makes of a record: computed alone, so that it depends on no other, and kept."""
        key = (record.request, record.rephrases, *record.locality.values())
        found = self._kept.get(key)
        if found is not None:
            return found
        encode, request = self.encoder.encode, record.request
        others = [*(probe.prompt for axis in record.locality.values() for probe in axis), *self._near_misses(request)]
        if not others:
            raise DataFormatError(
                f"record '{request.id}' has no locality probe, and there is no other record that differs in subject "
                "and prompt, so nothing says what is out of its scope; give records such as zsRE's"
            )
        bare = [encode(text, request.target) for text in (request.text, *record.rephrases)]
        wordings = [
            _continued(item, encode(text, f"{request.target}. {others[0]}"))
            for item, text in zip(bare, (request.text, *record.rephrases), strict=True)
        ]
        ends = [len(item.ids) for item in bare]
        ids = [item.ids for item in (*wordings, *(encode(text) for text in others))]
        states, below = self._states(ids, len(wordings))
        made = _Prepared(request, wordings, ends, states, below)
        if made.bytes <= self._room:
            self._room -= made.bytes
            self._kept[key] = made
        return made

    def _states(self, ids: Sequence[tuple[int, ...]], wordings: int) -> tuple[list[Tensor], list[Tensor]]:
        """States of texts at both layers, and of the first so many of them what enters the last layer."""
        last = len(self.view.layers) - 2
        hidden = {*self.layers, last} - {-1}
        rows = self.encoder.rows(ids).to(self.view.device)
        with torch.no_grad():
            found = self.view.forward(rows, stop=max(hidden), hidden=sorted(hidden)).hidden
        both = torch.cat([found[layer] for layer in self.layers], -1)
        # Copies, or one text would hold the memory of all.
        read, below = (
            [state[: len(row)].clone() for row, state in zip(ids, states, strict=False)]
            for states in (both, found.get(last, ()))
        )
        return read, below[:wordings]

    def _near_misses(self, request: EditRequest) -> list[str]:
        """The request's prompt about another subject, and another prompt about its subject."""
        begin = zlib.crc32(request.id.encode())
        for place in range(len(self.requests)):
            other = self.requests[(begin + place) % len(self.requests)]
            if other.subject != request.subject and other.prompt != request.prompt:
                return [request.prompt.replace("{}", other.subject), other.prompt.replace("{}", request.subject)]
        return []


@dataclass(frozen=True, slots=True, eq=False)
class _Answers:
    """How targets are said.

    Args:
        loss: mean over wordings of the mean negative log-likelihood of a target's tokens.
        right: ``[wordings]``, the share of tokens that are the likeliest.
    """

    loss: Tensor
    right: Tensor


class _Batch:
    """Texts of several records, all wordings first, before a memory of the records' edits."""

    def __init__(self, network: SeracNetwork, parts: Sequence[_Prepared]) -> None:
        self.network = network
        self.wordings = [item for part in parts for item in part.wordings]
        self.ends = [end for part in parts for end in part.ends]
        self.below = [state for part in parts for state in part.below]
        self.owner = [i for i, part in enumerate(parts) for _ in part.wordings]
        others = [state for part in parts for state in part.states[len(part.wordings) :]]
        texts = [*(state for part in parts for state in part.states[: len(part.wordings)]), *others]
        states = pad_sequence(texts, batch_first=True)
        lengths = torch.tensor([len(text) for text in texts], device=states.device)
        self.mask = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
        self.memory = Entries.stack([_entry(network, part) for part in parts])
        reading, _ = network.read(states)
        self.query = reading.query
        self.distance = network.distance(reading, self.mask, self.memory).each
        subjects = [part.request.subject for part in parts]
        same = [[subjects[own] == subject for subject in subjects] for own in self.owner]
        self.same = torch.tensor(same, device=states.device)

    def at_prompt_end(self) -> Tensor:
        """``-log g`` of each wording and edit where the prompt ends, ``[wordings, edits]``."""
        column = torch.tensor([item.start - 1 for item in self.wordings], device=self.mask.device)
        return self.distance[torch.arange(len(column), device=column.device), column]

    def others_scope(self) -> Tensor:
        """``β`` of the texts that are in no edit's scope, at the token where it is greatest."""
        return (-self.distance[len(self.wordings) :].amin((1, 2))).exp()

    def scope_loss(self) -> Tensor:
        """Binary cross-entropy, both classes weighing the same."""
        count = len(self.wordings)
        owner = torch.tensor(self.owner, device=self.mask.device)
        inside = self.at_prompt_end().gather(1, owner[:, None]).mean()
        nearest = self.distance.amin(1)
        # Another edit about the same subject may well hold a wording in its scope too: nothing is said about that.
        wrong = nearest[:count].masked_fill(self.same, FAR)
        return inside + not_any(torch.cat([wrong, nearest[count:]])).mean()

    def silence_loss(self) -> Tensor:
        """Negative log-likelihood of attending to nothing behind the targets."""
        losses: list[Tensor] = []
        for i, (item, end) in enumerate(zip(self.wordings, self.ends, strict=True)):
            if end < len(item.ids):
                query = self.query[i, end : len(item.ids)]
                losses.append(-self.network.attention(query, self.memory, self.owner[i])[:, 0].log().mean())
        return torch.stack(losses).mean() if losses else self.query.new_zeros(())


def _continued(item: Encoded, longer: Encoded) -> Encoded:
    """The longer text, unless the tokenizer takes the target's end and what follows it for one token."""
    return longer if longer.ids[: len(item.ids)] == item.ids else item


def _entry(network: SeracNetwork, part: _Prepared) -> Entries:
    """A memory of the record's edit."""
    item, end = part.wordings[0], part.ends[0]
    subject = item.last_token_of(part.request.subject_span)
    return network.entry(part.states[0][:end], subject, item.start - 1, item.ids[:end])
