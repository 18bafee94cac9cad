"""IKE: demonstrations of how a new fact is to be used stand before the fact and the prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from kecore.api.method import MethodContext
from kecore.api.types import Capabilities, EditRecord, EditRequest
from kecore.batch import RequestBatch
from kecore.edit import PromptEdit, PromptWriter, Reader, without_edits
from kecore.encoders import load_sentence_encoder
from kecore.model import ModelView
from kecore_methods.prompt.store import ScopeConfig, ScopeWriter, embedded
from kecore_methods.prompt.wording import WordingConfig, check_lengths, fact, preface, prompt_edit, remembered

__all__ = ["Ike", "IkeConfig", "IkeWriter", "demonstration", "nearest"]

Kind = Literal["copy", "update", "retain"]

_KINDS: tuple[Kind, ...] = ("retain", "update", "retain", "copy", "retain", "update", "retain", "update")
"""Kinds of the nearest demonstration, the next one, and so on: of eight, one copies, three update, four retain."""

_CHUNK = 64  # examples that are encoded between two reports of progress


class IkeConfig(ScopeConfig):
    """Configuration of IKE."""

    demonstrations: int = Field(
        default=16, ge=1, description="Demonstrations before each prompt (16 in EasyEdit, 32 in the paper)."
    )
    repeat: bool = Field(
        default=False,
        description="A last demonstration copies the new fact itself, as the published implementation has it.",
    )
    everywhere: bool = Field(
        default=True,
        description="Every prompt gets the nearest fact and its demonstrations, as in the paper; false leaves prompts "
        "alone that are about no fact, by `named` and `threshold`.",
    )

    @classmethod
    def presets(cls) -> Mapping[str, Mapping[str, Any]]:
        """The set-up of the paper."""
        return {"paper": {"demonstrations": 32}}


class IkeWriter(ScopeWriter[IkeConfig]):
    """Puts demonstrations and the nearest fact before a prompt.

    Args:
        facts: the store.
        embeddings: as for :class:`ScopeWriter`.
        config: wording, encoder, scope.
        demonstrations: text of all demonstrations of each fact.
    """

    Config = IkeConfig

    def __init__(
        self,
        facts: Sequence[EditRequest],
        embeddings: Tensor,
        config: IkeConfig,
        demonstrations: Sequence[str],
    ) -> None:
        super().__init__(facts, embeddings, config)
        self.demonstrations = tuple(demonstrations)

    def settings(self) -> dict[str, Any]:
        """Facts, configuration and demonstrations."""
        return {**super().settings(), "demonstrations": list(self.demonstrations)}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> IkeWriter:
        """The writer with this store."""
        facts = [EditRequest(**request) for request in settings["facts"]]
        config = IkeConfig.make(settings["config"])
        return cls(facts, tensors["embeddings"], config, settings["demonstrations"])

    def write(self, prompts: Sequence[str]) -> list[str]:
        """Demonstrations, the nearest fact, the prompt."""
        return [
            prompt if place is None else self.demonstrations[place] + preface(self.config, [self.facts[place]], prompt)
            for prompt, place in zip(prompts, self._places(prompts), strict=True)
        ]

    def _places(self, prompts: Sequence[str]) -> list[int | None]:
        if not self.config.everywhere:
            return [found[0] if found else None for found in self.in_scope(prompts)]
        if len(self.facts) == 1 or not prompts:
            return [0] * len(prompts)
        return self.likeness(prompts).argmax(-1).tolist()


class Ike:
    """Show the model, by demonstrations, how to use a new fact and when to leave it out of account."""

    name = "ike"
    Config = IkeConfig
    effect: ClassVar[type[PromptWriter]] = IkeWriter
    capabilities = Capabilities(kind="prompt", batch=True, sequential=True, needs_examples=True)
    reference = "Zheng et al., Can We Edit Factual Knowledge by In-Context Learning?, EMNLP 2023, arXiv:2305.12740"
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> PromptEdit:
        """Choose the demonstrations of each fact."""
        config: IkeConfig = context.config
        pool = context.need_examples(self.name)
        if not config.everywhere:
            _ = config.least  # refused here, not at the first prompt
        reader = Reader(view, context.encoder)
        facts = remembered(batch, context)
        with context.stages("encode"):
            index = _index(pool, config.encoder, reader, context)
            asked = load_sentence_encoder(config.encoder, reader)(
                [fact(request.text, request.target) for request in facts]
            )
            chosen = nearest(asked @ index.T, facts, pool, config.demonstrations)
            texts = ["".join(demonstration(config, pool[i], kind) for i, kind in places) for places in chosen]
            if config.repeat:
                own = [EditRecord(request) for request in facts]
                texts = [text + demonstration(config, r, "copy") for text, r in zip(texts, own, strict=True)]
            writer = IkeWriter(facts, embedded(facts, config, reader, context), config, texts)
            check_lengths(writer, batch.requests, reader)
        return prompt_edit(writer, facts, view, context, self.name)


def nearest(
    likeness: Tensor, facts: Sequence[EditRequest], pool: Sequence[EditRecord], count: int
) -> list[list[tuple[int, Kind]]]:
    """Which examples demonstrate each fact, and what; the most alike stands last, next to the fact.

    Args:
        likeness: ``[facts, examples]``, cosine of the statements.
        facts: what is demonstrated. An example about the very same prompt would give an answer away and is left out.
        pool: the examples.
        count: examples of one fact; fewer where there are not as many.
    """
    own = torch.tensor([[request.text == record.request.text for record in pool] for request in facts])
    order = likeness.masked_fill(own, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    chosen: list[list[tuple[int, Kind]]] = []
    for row, same in zip(order, own, strict=True):
        places: list[int] = row[: min(count, len(pool) - int(same.sum()))].tolist()
        kinds = (_KINDS * (len(places) // len(_KINDS) + 1))[: len(places)]
        chosen.append(list(zip(places, kinds, strict=True))[::-1])
    return chosen


def demonstration(wording: WordingConfig, record: EditRecord, kind: Kind) -> str:
    """An example as the paper's template has it: ``New Fact: x* y*``, ``Prompt: x y`` and an empty line.

    Copy asks the fact itself, update a paraphrase, and retain another prompt, whose own answer stays. A record without
    paraphrases or neighbours can only be copied.
    """
    request = record.request
    asked = {"copy": (request.text, request.target), "update": None, "retain": None}
    if record.rephrases:
        asked["update"] = (record.rephrases[0], request.target)
    kept = [(prompt, request.ground_truth) for prompt in record.neighbourhood if request.ground_truth]
    kept += [
        (probe.prompt, probe.answers[0]) for probes in record.locality.values() for probe in probes if probe.answers
    ]
    if kept:
        asked["retain"] = kept[0]
    prompt, answer = asked[kind] or (request.text, request.target)
    return preface(wording, [request], fact(prompt, answer)) + "\n\n"


def _index(pool: Sequence[EditRecord], encoder: str, reader: Reader, context: MethodContext) -> Tensor:
    """``[examples, width]``: the examples' statements as the encoder sees them; encoded once a session."""
    texts = [fact(record.request.text, record.request.target) for record in pool]
    key = ("examples", encoder, tuple(texts))
    if key not in context.memo:
        embed = load_sentence_encoder(encoder, reader)
        rows: list[Tensor] = []
        with without_edits(reader.view.model):
            for start in range(0, len(texts), _CHUNK):
                rows.append(embed(texts[start : start + _CHUNK]))
                context.progress("examples", min(start + _CHUNK, len(texts)), len(texts))
        context.memo[key] = torch.cat(rows)
    return context.memo[key]
