"""KN: the few neurons that express a fact, and what they write, changed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from kecore.api.errors import NumericalError, UnsupportedModelError
from kecore.api.method import MethodContext
from kecore.api.requirements import check_count
from kecore.api.types import Capabilities, EditRequest
from kecore.batch import RequestBatch
from kecore.edit import LowRank, Update, WeightEdit
from kecore.engine import contexts
from kecore.memory import Need
from kecore.model import ModelView, SiteId
from kecore.text import Encoder, join_context
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.locate.neurons import Neuron, attribute, attribution_need, knowledge_neurons, next_tokens
from kecore_methods.presets import Published

__all__ = ["Kn"]


class Kn:
    """Knowledge neurons: found by integrated gradients, then overwritten with the new answer, or erased."""

    class Config(Published):
        """Configuration; numbers of the paper, but for lengths, which are relative."""

        hparams_table: ClassVar[HparamsTable | None] = hparams.KN

        operation: Literal["update", "erase"] = Field(
            default="update", description="Write the target into the neurons' values, or set these to zero."
        )
        steps: int = Field(default=20, ge=1, description="Terms of the integral (20 in the paper).")
        threshold: float = Field(
            default=0.2, ge=0, lt=1, description="Attribution from which a neuron counts, as a share of the highest."
        )
        share: float = Field(
            default=0.4, ge=0, lt=1, description="Share of the prompts that a kept neuron counts in (EasyEdit: 0.4)."
        )
        contexts: int = Field(default=3, ge=0, le=64, description="Context prefixes, each of which gives a prompt.")
        context_tokens: int = Field(default=10, ge=1, le=64, description="Length of a context prefix in tokens.")
        old_weight: float = Field(
            default=0.5,
            ge=0,
            description="How much of the old answer is taken out (lambda 1), in units of the mean norm of the layer's "
            "values.",
        )
        new_weight: float = Field(
            default=4.0, gt=0, description="How much of the target is put in (lambda 2), in the same units."
        )

        def needs(self, view: ModelView, batch: RequestBatch) -> list[Need]:
            """Return the memory of the integral's rows."""
            width = max(item.start for item in batch.encodings)
            prefix = self.context_tokens + 3 if self.contexts else 0  # its opening and a full stop
            return [attribution_need(view, self.contexts + 1, self.steps, width + prefix)]

    name = "kn"
    capabilities = Capabilities(kind="weights", needs_subject=False)
    reference = "Dai et al., Knowledge Neurons in Pretrained Transformers, ACL 2022, arXiv:2104.08696"
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> WeightEdit:
        """Locate the neurons of a request and plan their new values; the model is bitwise as before on return.

        Raises:
            UnsupportedCapabilityError: there are several requests.
            UnsupportedModelError: the unembedding is no matrix of the residual stream's width.
            NumericalError: no neuron speaks for the old answer.
        """
        config: Kn.Config = context.config
        check_count(Kn, batch.requests)
        (request,), (encoded,) = batch.requests, batch.encodings
        unembedding = _unembedding(view)
        changes: dict[int, dict[int, Tensor]] = {}
        with view.frozen():
            with context.stages("contexts"):
                prefixes = contexts.of_session(view, context, config.contexts, config.context_tokens)
            with context.stages("attribution"):
                old, neurons = self._locate(view, request, prefixes, context)
            new = encoded.ids[encoded.start]
            old_direction, new_direction = normalize(unembedding[[old, new]].float(), dim=1).cpu()
            # Section 5.1 of the paper: v += lambda2 t' - lambda1 t.
            step = config.new_weight * new_direction - config.old_weight * old_direction
            for neuron in neurons:
                changes.setdefault(neuron.layer, {})[neuron.index] = self._change(view, neuron, step, config)
        updates: dict[SiteId, Update] = {}
        for layer in sorted(changes):
            site = view.layers[layer].site
            updates[site.id] = _column_update(site.linear.d_in, changes[layer])
        notes = {
            "layers": sorted(changes),
            "neurons": {request.id: [list(astuple(neuron)) for neuron in neurons]},
        }
        return WeightEdit.planned(view, updates, context, method=self.name, requests=(request,), notes=notes)

    def _locate(
        self, view: ModelView, request: EditRequest, prefixes: Sequence[str], context: MethodContext
    ) -> tuple[int, list[Neuron]]:
        """Return the old answer's first token, and the neurons that speak for it.

        Raises:
            NumericalError: there are none.
        """
        config: Kn.Config = context.config
        prompts = [join_context(prefix, request.text) for prefix in prefixes]
        if request.ground_truth is None:
            (old,) = next_tokens(view, context.encoder, [request.text])
        else:
            old = _first_token(context.encoder, request, request.ground_truth)
        attributions = attribute(
            view,
            context.encoder,
            prompts,
            [old] * len(prompts),
            steps=config.steps,
            memory=context.memory,
            progress=context.progress,
        )
        neurons = knowledge_neurons(attributions, threshold=config.threshold, share=config.share)
        if not neurons:
            raise NumericalError(
                f"request '{request.id}': no activation makes the old answer more likely, so there is nothing to "
                "edit; give the old answer as ground_truth, or leave it out to take the model's own"
            )
        return old, neurons

    @staticmethod
    def _change(view: ModelView, neuron: Neuron, step: Tensor, config: Config) -> Tensor:
        """Return what is added to a neuron's value, ``[d_out]``; ``step`` is in units of the layer's values."""
        weight = view.layers[neuron.layer].site.linear.weight.float()
        if config.operation == "erase":
            return -weight[:, neuron.index].cpu()
        length = float(weight.norm(dim=0).mean())  # a neuron's value is a column
        if neuron.activation <= 0:
            # A negative activation, which gated blocks have as often as not, turns what its value writes round.
            length = -length
        return length * step


def _unembedding(view: ModelView) -> Tensor:
    """Return the direction that the unembedding reads for each token, ``[vocab, d_model]``.

    Raises:
        UnsupportedModelError: it does not read the residual stream.
    """
    weight: Any = view.unembedding.weight
    if tuple(weight.shape[1:]) != (view.width,):
        raise UnsupportedModelError(
            f"{type(view.model).__name__}: the unembedding {list(weight.shape)} does not read the residual stream of "
            f"width {view.width}, so answers have no direction in it"
        )
    return weight.detach()


def _first_token(encoder: Encoder, request: EditRequest, answer: str) -> int:
    """Return an answer's first token."""
    item = encoder.encode(request.text, answer)
    return item.ids[item.start]


def _column_update(d_in: int, changes: dict[int, Tensor]) -> LowRank:
    """Return changes ``[d_out]`` of columns of a weight as factors; the second holds one unit vector a column."""
    columns = sorted(changes)
    unit_vectors = torch.zeros(d_in, len(columns))
    for rank, column in enumerate(columns):
        unit_vectors[column, rank] = 1
    return LowRank(torch.stack([changes[column] for column in columns], dim=1), unit_vectors)
