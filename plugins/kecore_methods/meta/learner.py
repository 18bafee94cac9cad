"""The base of methods that pass gradients through a network: their plan, and the training of the network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kecore.api.config import MethodConfig
from kecore.api.errors import ConfigError, DataFormatError
from kecore.api.method import MethodContext
from kecore.api.types import Capabilities, EditRecord
from kecore.batch import RequestBatch
from kecore.edit import LowRank, Update, WeightEdit
from kecore.engine.layers import at_depth
from kecore.engine.record_memo import RecordMemo
from kecore.memory import Need, backward_bytes, logits_bytes
from kecore.model import ModelView, SiteId
from kecore.text import Encoded
from kecore.training import Schedule, module_state, restore_module
from kecore_methods.meta.factors import Factors, Reader, Shifts, Texts, low_rank, nll, row_means

__all__ = ["GradientConfig", "GradientEditor", "GradientLearner", "Network"]

_OBSERVED = 32  # records that normalisation takes its statistics from
_TOGETHER = 8  # requests whose gradients are taken in one pass


class GradientConfig(MethodConfig):
    """Configuration that all methods of the family share."""

    layers: tuple[int, ...] | None = Field(
        default=None, description="Layers whose value projections are edited; None goes by depth (kecore's choice)."
    )
    first_depth: float = Field(
        default=0.92, ge=0, le=1, description="Depth of the first edited layer (MEND's paper: the last three)."
    )
    last_depth: float = Field(
        default=1.0, ge=0, le=1, description="Depth of the last edited layer (MEND's paper: the last)."
    )
    together: int = Field(
        default=2,
        ge=1,
        description="Requests of one edit while it is trained; an edit may have any number of them (kecore's choice, "
        "tried on tiny models; as many as are edited later in MEND's paper).",
    )
    learning_rate: float = Field(
        default=1e-3, gt=0, description="Of Adam, while the network is trained (kecore's choice; EasyEdit: 1e-6)."
    )
    edit_weight: float = Field(
        default=0.1, gt=0, description="Weight of the edit loss beside the locality loss (0.1 in MEND's paper)."
    )
    clip: float = Field(default=1.0, gt=0, description="Largest norm of the network's gradient (kecore's choice).")

    def edited_layers(self, view: ModelView) -> tuple[int, ...]:
        """Return the edited layers, ascending; by depth unless given."""
        if self.layers is None:
            return at_depth(view, self.first_depth, self.last_depth)
        return tuple(sorted({view.layer(index).index for index in self.layers}))

    def needs(self, view: ModelView, batch: RequestBatch) -> list[Need]:
        """Return the memory of gradients in small batches, and of the factors of all requests."""
        layers = self.edited_layers(view)
        items = batch.encodings
        tokens = sum(len(item.ids) for item in items)
        target_tokens = sum(len(item.ids) - item.start for item in items)
        longest = max(len(item.ids) for item in items)
        projections = [view.layers[i].site.linear for i in layers]
        widths = sum(projection.d_in + projection.d_out for projection in projections)
        at_once = longest * min(_TOGETHER, len(items))
        # Logits are computed at targets only; their share falls on every token, rounded up.
        logits_per_token = (target_tokens * logits_bytes(view) + tokens - 1) // tokens
        token = backward_bytes(view, layers[0]) + logits_per_token
        return [Need("gradients", {"factors and shifts": 4 * 4 * tokens * widths}, token, at_once, at_once)]


class Network(nn.Module):
    """A hyper-network: gradient factors in, updates out."""

    def normalise(self, factors: Factors) -> None:
        """Take statistics of the factors of some records, before training."""

    def shifts(self, view: ModelView, items: Sequence[Encoded], factors: Factors, together: int) -> Shifts:
        """Return one update for each ``together`` consecutive requests.

        Args:
            view: the model.
            items: each request's prompt with its target.
            factors: the requests' gradient factors; their number is a multiple of ``together``.
            together: requests of one update.
        """
        raise NotImplementedError

    def objective(self, edit: Tensor, kl: Tensor) -> Tensor | None:
        """Return what a step lowers, given the edit loss and the KL; None for the weighted sum of both."""
        return None


class GradientEditor:
    """A method that passes gradients through a trained network; siblings differ in the network."""

    Config: ClassVar[type[GradientConfig]] = GradientConfig
    capabilities = Capabilities("weights", batch=True, sequential=True, needs_training=True, needs_subject=False)
    api = (2, 2)
    schedule = Schedule(steps=400, batch_size=8)
    name: ClassVar[str]

    def network(self, view: ModelView, config: GradientConfig) -> Network:
        """Return a fresh network for this model."""
        raise NotImplementedError

    def prepare(self, view: ModelView, records: Sequence[EditRecord], context: MethodContext) -> GradientLearner:
        """Return a learner for this model."""
        return GradientLearner(self.network(view, context.config), view, records, context)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> WeightEdit:
        """Pass the gradients of all requests through the network; the model is bitwise as before."""
        config: GradientConfig = context.config
        tensors = context.need_trained(view, self.name)
        layers = config.edited_layers(view)
        with view.frozen(), torch.no_grad():
            network = self.network(view, config).to(view.device)
            network.load_state_dict(dict(tensors))
            reader = Reader(view, context.encoder, layers)
            items = batch.encodings
            chunks: list[Factors] = []
            with context.stages("gradients"):
                for begin in range(0, len(items), _TOGETHER):
                    context.progress("gradients", begin, len(items))
                    chunks.append(reader.factors(reader.texts(items[begin : begin + _TOGETHER])))
            context.progress("gradients", len(items), len(items))
            with context.stages("network"):
                factors = Factors.stack(chunks)
                shifts = network.shifts(view, items, factors, len(items))
        updates: dict[SiteId, Update] = {}
        for layer, (u, v) in shifts.items():
            # Padding holds no token, so its factors are no part of the update.
            tokens = (u[0] != 0).any(1) & (v[0] != 0).any(1)
            site = view.layers[layer].site.id
            updates[site] = LowRank(*low_rank(u[0, tokens].cpu(), v[0, tokens].cpu()))
        notes = {"layers": list(layers)}
        return WeightEdit.planned(view, updates, context, method=self.name, requests=batch.requests, notes=notes)


class GradientLearner:
    """Trains a network: the edit loss on wordings of the edited fact, and the KL of unrelated answers.

    MEND's objective (arXiv 2110.11309, eq. 4): ``c_e · -log p(target | rephrase, edited) + KL(p(· | unrelated) ‖
    p(· | unrelated, edited))``. Every record of a batch has an edit of its own (or every ``together`` of them), all in
    one pass.
    """

    def __init__(
        self, network: Network, view: ModelView, records: Sequence[EditRecord], context: MethodContext
    ) -> None:
        self.config: GradientConfig = context.config
        self.network, self.view = network.to(view.device), view
        self.reader = Reader(view, context.encoder, self.config.edited_layers(view))
        self._memo: RecordMemo[_Prepared] = RecordMemo(context.memory // 2)
        network.normalise(
            Factors.stack([self._memo.get(record, self._prepare).factors for record in records[:_OBSERVED]])
        )
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.config.learning_rate)

    def step(self, records: Sequence[EditRecord]) -> float:
        """Update the network once and return the loss."""
        if len(records) % self.config.together:
            raise ConfigError(
                f"batches of {len(records)} records cannot be cut into edits of {self.config.together} (together); "
                "make the batch size a multiple of it"
            )
        with torch.enable_grad():
            losses = self._losses(records, self.config.together)
            loss = self.network.objective(losses.edit, losses.kl)
            if loss is None:
                loss = self.config.edit_weight * losses.edit + losses.kl
            self.optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self, records: Sequence[EditRecord]) -> dict[str, float]:
        """Return losses, the share of right tokens (teacher-forced) on prompts and rephrases, and of same answers."""
        totals: dict[str, float] = {}
        for chunk, together in _cut_into_edits(records, self.config.together):
            losses = self._losses(chunk, together)
            edit, kl = float(losses.edit), float(losses.kl)
            loss = self.config.edit_weight * edit + kl
            for name, value in {"loss": loss, "edit loss": edit, "KL": kl, **losses.figures}.items():
                totals[name] = totals.get(name, 0.0) + value * len(chunk) / len(records)
        return totals

    def state(self) -> Mapping[str, Tensor]:
        """Return the network with its statistics, and Adam's moments."""
        return module_state(self.network, self.optimizer)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        restore_module(self.network, self.optimizer, state)

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the network's tensors."""
        return self.network.state_dict()

    def _losses(self, records: Sequence[EditRecord], together: int) -> _Losses:
        """Return the losses of edits, and the figures of an evaluation.

        Args:
            records: what is edited, ``together`` consecutive ones by one update.
            together: requests of one update; their number is a multiple of it.
        """
        prepared = [self._memo.get(record, self._prepare) for record in records]
        factors = Factors.stack([record.factors for record in prepared])
        prompts = [record.wordings[0] for record in prepared]
        shifts = self.network.shifts(self.view, prompts, factors, together)

        wording_states = [record.wording_states for record in prepared]
        wordings = self._join([record.wordings for record in prepared], wording_states, together)
        texts = wordings.texts
        logits = self.reader.logits(texts, shifts, wordings.group)  # [targets, vocab]
        edit = row_means(nll(logits, texts), texts).mean()
        accuracy: list[float] = row_means((logits.argmax(-1) == texts.token).float(), texts).tolist()  # of each row
        prompt_accuracy: list[float] = []
        rephrase_accuracy: list[float] = []
        for row, share in enumerate(accuracy):
            if row == 0 or wordings.record[row - 1] != wordings.record[row]:  # a record's first wording is its prompt
                prompt_accuracy.append(share)
            else:
                rephrase_accuracy.append(share)

        unrelated_states = [record.unrelated_states for record in prepared]
        unrelated = self._join([record.unrelated for record in prepared], unrelated_states, together)
        texts = unrelated.texts
        with torch.no_grad():
            before = self.reader.logits(texts).log_softmax(-1)  # [targets, vocab]
        after = self.reader.logits(texts, shifts, unrelated.group).log_softmax(-1)
        kl = row_means((before.exp() * (before - after)).sum(-1), texts).mean()
        same = row_means((before.argmax(-1) == after.argmax(-1)).float(), texts)  # [rows]
        figures = {
            "edit accuracy": sum(prompt_accuracy) / len(prompt_accuracy),
            "rephrase accuracy": sum(rephrase_accuracy) / max(1, len(rephrase_accuracy)),
            "locality": float(same.mean()),
        }
        return _Losses(edit, kl, figures)

    def _join(
        self, items: Sequence[Sequence[Encoded]], states: Sequence[Sequence[Tensor]], together: int
    ) -> _JoinedTexts:
        """Return the texts of several records in one.

        Args:
            items: each record's texts.
            states: each record's states of them; empty where the first edited layer is the model's first.
            together: records of one update.
        """
        record_of_row: list[int] = []
        for index, record_items in enumerate(items):
            record_of_row += [index] * len(record_items)
        texts = self.reader.texts(list(chain.from_iterable(items)), list(chain.from_iterable(states)))
        group = torch.tensor([record // together for record in record_of_row], device=texts.row.device)
        return _JoinedTexts(texts, record_of_row, group)

    def _prepare(self, record: EditRecord) -> _Prepared:
        """Run the unedited model on the texts of a record.

        Raises:
            DataFormatError: the record has no locality probe with an answer.
        """
        encode, request = self.reader.encoder.encode, record.request
        wordings = [encode(text, request.target) for text in (request.text, *record.prompts_of("paraphrase"))]
        probes = [probe for probe in record.probes_of("locality") if probe.answers]
        if not probes:
            raise DataFormatError(
                f"record '{request.id}' has no locality probe with an answer, and training needs some to keep other "
                "facts as they are; give records such as zsRE's"
            )
        unrelated = [encode(probe.prompt, probe.answers[0]) for probe in probes]
        states = self.reader.states([*wordings, *unrelated])
        factors = self.reader.factors(self.reader.texts(wordings[:1], states[:1]))
        return _Prepared(wordings, unrelated, states, factors)


@dataclass(frozen=True, slots=True, eq=False)
class _Losses:
    """Losses of some edits.

    Args:
        edit: mean negative log-likelihood of the targets behind all wordings.
        kl: mean divergence of unrelated answers.
        figures: what an evaluation reports beside them, by name.
    """

    edit: Tensor
    kl: Tensor
    figures: Mapping[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class _JoinedTexts:
    """Texts of several records, one record's behind another's.

    Args:
        texts: the rows.
        record: each row's record.
        group: ``[rows]``: the update that acts on each row.
    """

    texts: Texts
    record: Sequence[int]
    group: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """A record as the unedited model reads it.

    Args:
        wordings: its prompt and rephrases, each with the target.
        unrelated: locality prompts with their answers.
        states: what enters the first edited layer, for all of them; empty where that is the model's first.
        factors: of the prompt's gradient.
    """

    wordings: list[Encoded]
    unrelated: list[Encoded]
    states: list[Tensor]
    factors: Factors

    @property
    def wording_states(self) -> list[Tensor]:
        """The states of the wordings."""
        return self.states[: len(self.wordings)]

    @property
    def unrelated_states(self) -> list[Tensor]:
        """The states of the locality prompts."""
        return self.states[len(self.wordings) :]

    @property
    def bytes(self) -> int:
        """Memory that the record takes."""
        tensors = [*self.states, *self.factors.inputs.values(), *self.factors.deltas.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _cut_into_edits(records: Sequence[EditRecord], together: int) -> Iterator[tuple[Sequence[EditRecord], int]]:
    """Yield records in chunks of whole edits, with the requests of an edit; what is left over is an edit of fewer."""
    in_whole_edits = len(records) // together * together
    size = max(1, _TOGETHER // together) * together
    for begin in range(0, in_whole_edits, size):
        yield records[begin : min(in_whole_edits, begin + size)], together
    if in_whole_edits < len(records):
        yield records[in_whole_edits:], len(records) - in_whole_edits
