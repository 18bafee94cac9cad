"""Training of SERAC's two networks, on texts that are in an edit's scope and on texts that are not."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kecore.api.errors import DataFormatError
from kecore.api.method import MethodContext
from kecore.api.types import EditRecord, EditRequest
from kecore.engine.record_memo import RecordMemo
from kecore.model import ModelView
from kecore.model.sites import Output, Start
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
        wordings: its prompt and rephrases, each with the target and, where the tokenizer lets the target end there, a
            full stop and an unrelated text behind it.
        ends: the column behind each wording's target.
        states: at both layers ``[tokens, 2 · width]``, of the wordings and then of texts out of scope.
        below: what enters the last layer, for each wording; empty where that is the model's first.
    """

    request: EditRequest
    wordings: list[Encoded]
    ends: list[int]
    states: list[Tensor]
    below: list[Tensor]

    @property
    def bytes(self) -> int:
        """Memory that the record takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self.states, *self.below))


class SeracLearner:
    """Trains both networks at once; they share no parameter, so each has the loss that it has alone.

    The scope classifier: binary cross-entropy of ``β(x) = max g(z, x)`` over the edits of a batch (arXiv 2206.06520,
    section 3.2). In scope are prompt and rephrases of an edit; out of it are its locality probes, its own prompt about
    another subject, another prompt about its own subject, and all wordings of the other edits. The counterfactual
    head: negative log-likelihood of the target behind each wording, given the edit, and of silence behind the target.

    Args:
        network: both networks.
        layers: both layers that are read.
        view: the model.
        records: the training records.
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
        self._memo: RecordMemo[_Prepared] = RecordMemo(context.memory // 2)
        observed: list[Tensor] = []
        for record in records[:_OBSERVED]:
            observed += self._memo.get(record, self._prepare).states
        network.observe(torch.cat(observed))
        scalars = list(network.scalars.parameters())
        scalar_ids = {id(scalar) for scalar in scalars}
        matrices = [parameter for parameter in network.parameters() if id(parameter) not in scalar_ids]
        groups = [
            {"params": matrices, "lr": self.config.learning_rate},
            {"params": scalars, "lr": self.config.scalar_learning_rate},
        ]
        self.optimizer = torch.optim.Adam(groups)

    def step(self, records: Sequence[EditRecord]) -> float:
        """Update both networks once and return the loss."""
        prepared = [self._memo.get(record, self._prepare) for record in records]
        with torch.enable_grad():
            batch = _Batch(self.network, prepared)
            loss = batch.scope_loss() + self._answers(batch, batch.owner).loss + batch.silence_loss()
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self, records: Sequence[EditRecord]) -> dict[str, float]:
        """Return losses, and shares of success with all of these records' edits in one memory.

        The shares are of the targets' tokens that the model is right about, behind prompts and behind rephrases
        (teacher-forced; by the model itself where no edit is in scope, and after a wrong edit where a wrong one is in
        scope), of rephrases that are in the scope of the right edit, and of unrelated texts that are in no scope.
        """
        batch = _Batch(self.network, [self._memo.get(record, self._prepare) for record in records])
        least, nearest = batch.at_prompt_end().min(-1)  # [wordings] each
        in_scope = (-least).exp() >= self.config.threshold
        chosen = torch.where(in_scope, nearest, -1)
        right_edit = self._answers(batch, batch.owner)
        accuracy = self._answers(batch, chosen.tolist()).right  # [wordings]
        owner = torch.tensor(batch.owner)
        is_prompt = torch.ones(len(owner), dtype=torch.bool)
        is_prompt[1:] = owner[1:] != owner[:-1]  # a record's first wording
        chose_right_edit = (chosen.cpu() == owner).float()
        scope_loss = float(batch.scope_loss())
        figures = {
            "loss": scope_loss + float(right_edit.loss) + float(batch.silence_loss()),
            "scope loss": scope_loss,
            "answer loss": float(right_edit.loss),
            "edit accuracy": float(accuracy[is_prompt].mean()),
        }
        if not bool(is_prompt.all()):
            figures["rephrase accuracy"] = float(accuracy[~is_prompt].mean())
            figures["rephrases in scope"] = float(chose_right_edit[~is_prompt].mean())
        return {**figures, "kept out": float((batch.unrelated_scope() < self.config.threshold).float().mean())}

    def state(self) -> Mapping[str, Tensor]:
        """Return both networks with the statistics of states, and Adam's moments."""
        return module_state(self.network, self.optimizer)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        restore_module(self.network, self.optimizer, state)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the tensors of both networks."""
        return self.network.state_dict()

    def _answers(self, batch: _Batch, edits: Sequence[int]) -> _Answers:
        """Return how likely each wording's target is under an edit.

        Args:
            batch: the wordings and the memory.
            edits: for each wording the index of the edit in force, -1 for none.
        """
        losses: list[Tensor] = []
        right: list[Tensor] = []
        for begin in range(0, len(edits), _TOGETHER):
            wordings = range(begin, min(begin + _TOGETHER, len(edits)))
            logits, row, token = self._logits(batch, wordings, edits)
            nll = nn.functional.cross_entropy(logits, token, reduction="none")  # [targets]
            losses.append(_row_means(nll, row, len(wordings)))
            right.append(_row_means((logits.argmax(-1) == token).float(), row, len(wordings)))
        return _Answers(torch.cat(losses).mean(), torch.cat(right).cpu())

    def _logits(self, batch: _Batch, wordings: range, edits: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of the targets' tokens ``[targets, vocabulary]`` float32, their rows and the tokens.

        Args:
            batch: the wordings and the memory.
            wordings: indices of the wordings that are run, one row each.
            edits: for each wording of the batch the index of the edit in force, -1 for none.
        """
        view, head = self.view, self.view.unembedding
        weight: Any = head.weight
        rows = self.encoder.rows([batch.wordings[i].ids for i in wordings]).to(view.device)
        below: list[Tensor] = []
        if batch.below:
            below = [batch.below[i] for i in wordings]
        last = len(view.layers) - 1
        targets: list[tuple[int, int, int]] = []  # row, column that predicts, token
        for r, i in enumerate(wordings):
            ids = batch.wordings[i].ids
            targets += [(r, j - 1, ids[j]) for j in range(batch.wordings[i].start, batch.ends[i])]
        row, column, token = torch.tensor(targets, device=view.device).t()

        def speak(hidden: Tensor) -> Tensor:
            """Return the last layer's output ``[rows, tokens, width]`` as the edits have it."""
            width = hidden.shape[1]
            changed: list[Tensor] = []
            for r, i in enumerate(wordings):
                if edits[i] >= 0:
                    query = batch.query[i, :width]
                    changed.append(
                        self.network.counterfactual(
                            hidden[r], query=query, entries=batch.memory, index=edits[i], head=weight
                        )
                    )
                else:
                    changed.append(hidden[r])
            return torch.stack(changed)

        first = Start(last, pad_sequence(below, batch_first=True)) if below else None
        out = view.run(rows, patches={Output(last): speak}, first=first, at=(row, column))
        return out.logits.float(), row, token

    def _prepare(self, record: EditRecord) -> _Prepared:
        """Run the unedited model on the texts of a record.

        Raises:
            DataFormatError: no text is out of the edit's scope.
        """
        encode, request = self.encoder.encode, record.request
        unrelated = [*record.prompts_of("locality"), *self._near_misses(request)]
        if not unrelated:
            raise DataFormatError(
                f"record '{request.id}' has no locality probe, and there is no other record that differs in subject "
                "and prompt, so nothing says what is out of its scope; give records such as zsRE's"
            )
        wordings: list[Encoded] = []
        ends: list[int] = []
        for prompt in (request.text, *record.prompts_of("paraphrase")):
            with_target = encode(prompt, request.target)
            wordings.append(_continue(with_target, encode(prompt, f"{request.target}. {unrelated[0]}")))
            ends.append(len(with_target.ids))
        ids = [item.ids for item in wordings]
        ids += [encode(text).ids for text in unrelated]
        states, below = self._states(ids, len(wordings))
        return _Prepared(request, wordings, ends, states, below)

    def _states(self, ids: Sequence[tuple[int, ...]], wordings: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return the states of texts at both layers, and of the first ``wordings`` texts what enters the last layer."""
        last = len(self.view.layers) - 2
        read_layers = {*self.layers, last} - {-1}  # a model of one layer has none below its last
        rows = self.encoder.rows(ids).to(self.view.device)
        with torch.no_grad():
            out = self.view.run(rows, taps=map(Output, sorted(read_layers)), last=max(read_layers))
        hidden_states = torch.cat([out[Output(layer)] for layer in self.layers], -1)  # [texts, tokens, 2 · width]
        # Copies, or one text would hold the memory of all.
        states = [hidden_states[i, : len(ids[i])].clone() for i in range(len(ids))]
        below: list[Tensor] = []
        if Output(last) in out.taps:
            below = [out[Output(last)][i, : len(ids[i])].clone() for i in range(wordings)]
        return states, below

    def _near_misses(self, request: EditRequest) -> list[str]:
        """Return the request's prompt about another subject, and another prompt about its subject."""
        begin = zlib.crc32(request.id.encode())  # by content, so that a record's near misses are always the same
        for offset in range(len(self.requests)):
            candidate = self.requests[(begin + offset) % len(self.requests)]
            if candidate.subject is None or request.subject is None:
                continue
            if candidate.subject != request.subject and candidate.prompt != request.prompt:
                return [request.about(candidate.subject), candidate.about(request.subject)]
        return []


@dataclass(frozen=True, slots=True, eq=False)
class _Answers:
    """Likelihoods of targets.

    Args:
        loss: mean over wordings of the mean negative log-likelihood of a target's tokens.
        right: ``[wordings]``, the share of tokens that are the likeliest.
    """

    loss: Tensor
    right: Tensor


class _Batch:
    """Texts of several records, all wordings first, before a memory of the records' edits.

    Attributes:
        wordings: of all records, one record's after another's.
        ends: the column behind each wording's target.
        below: what enters the last layer, for each wording; empty where that is the model's first.
        owner: index of each wording's record, which is that of its edit in the memory.
        memory: the edits.
        mask: ``[texts, tokens]``, real tokens; unrelated texts follow the wordings.
        query: ``[texts, tokens, rank]``.
        distance: ``[texts, tokens, edits]``, ``-log g``.
        same_subject: ``[wordings, edits]``.
    """

    def __init__(self, network: SeracNetwork, records: Sequence[_Prepared]) -> None:
        self.network = network
        self.wordings: list[Encoded] = []
        self.ends: list[int] = []
        self.below: list[Tensor] = []
        self.owner: list[int] = []
        wording_states: list[Tensor] = []
        unrelated_states: list[Tensor] = []
        for index, record in enumerate(records):
            count = len(record.wordings)
            self.wordings += record.wordings
            self.ends += record.ends
            self.below += record.below
            self.owner += [index] * count
            wording_states += record.states[:count]
            unrelated_states += record.states[count:]
        texts = wording_states + unrelated_states
        states = pad_sequence(texts, batch_first=True)  # [texts, tokens, 2 · width]
        lengths = torch.tensor([len(text) for text in texts], device=states.device)
        self.mask = torch.arange(states.shape[1], device=states.device) < lengths[:, None]
        self.memory = Entries.stack([_make_entry(network, record) for record in records])
        reading, _ = network.read(states)
        self.query = reading.query
        self.distance = network.distance(reading, self.mask, self.memory).each
        subjects = [record.request.subject for record in records]
        same_subject: list[list[bool]] = []
        for owner in self.owner:
            same_subject.append([subject == subjects[owner] for subject in subjects])
        self.same_subject = torch.tensor(same_subject, device=states.device)

    def at_prompt_end(self) -> Tensor:
        """Return ``-log g`` of each wording and edit where the prompt ends, ``[wordings, edits]``."""
        column = torch.tensor([item.start - 1 for item in self.wordings], device=self.mask.device)
        return self.distance[torch.arange(len(column), device=column.device), column]

    def unrelated_scope(self) -> Tensor:
        """Return ``β`` of the texts that are in no edit's scope, at the token where it is greatest."""
        return (-self.distance[len(self.wordings) :].amin((1, 2))).exp()

    def scope_loss(self) -> Tensor:
        """Return the binary cross-entropy of ``β`` (section 3.2), both classes weighing the same."""
        count = len(self.wordings)
        owner = torch.tensor(self.owner, device=self.mask.device)
        inside = self.at_prompt_end().gather(1, owner[:, None]).mean()
        nearest = self.distance.amin(1)  # [texts, edits]
        # Another edit about the same subject may well hold a wording in its scope too: it counts neither way.
        wrong = nearest[:count].masked_fill(self.same_subject, FAR)
        return inside + not_any(torch.cat([wrong, nearest[count:]])).mean()

    def silence_loss(self) -> Tensor:
        """Return the negative log-likelihood of attending to nowhere behind the targets."""
        losses: list[Tensor] = []
        for i, (item, end) in enumerate(zip(self.wordings, self.ends, strict=True)):
            if end < len(item.ids):
                query = self.query[i, end : len(item.ids)]
                nowhere = self.network.attention(query, self.memory, self.owner[i])[:, 0]
                losses.append(-nowhere.log().mean())
        if not losses:
            return self.query.new_zeros(())
        return torch.stack(losses).mean()


def _row_means(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Return the mean of ``[targets]`` values over each row, ``[rows]``."""
    return values.new_zeros(rows).index_add(0, row, values) / torch.bincount(row, minlength=rows)


def _continue(item: Encoded, longer: Encoded) -> Encoded:
    """Return the longer text, or the item where the tokenizer merges the target's end with what follows it."""
    if longer.ids[: len(item.ids)] != item.ids:
        return item
    return longer


def _make_entry(network: SeracNetwork, record: _Prepared) -> Entries:
    """Return a memory of the record's edit."""
    item, end = record.wordings[0], record.ends[0]
    subject = item.last_token_of(record.request.subject_span)
    return network.entry(record.states[0][:end], subject=subject, prompt=item.start - 1, ids=item.ids[:end])
