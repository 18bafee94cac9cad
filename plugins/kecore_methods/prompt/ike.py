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
from kecore.engine.session_facts import session_facts
from kecore.model import ModelView
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.presets import Published
from kecore_methods.prompt.encoders import load_sentence_encoder
from kecore_methods.prompt.store import ScopeConfig, ScopeWriter, embed_facts
from kecore_methods.prompt.wording import WordingConfig, check_lengths, preface, prompt_edit, statement

__all__ = ["Ike", "IkeConfig", "IkeWriter", "choose_examples", "demonstration"]

Kind = Literal["copy", "update", "retain"]

_KINDS: tuple[Kind, ...] = ("retain", "update", "retain", "copy", "retain", "update", "retain", "update")
"""Kinds of the nearest demonstration, the next one, and so on: of eight, one copies, three update, four retain."""

_CHUNK = 64  # examples that are encoded between two reports of progress


class IkeConfig(Published, ScopeConfig):
    """Configuration of IKE."""

    preset_file: ClassVar[str] = "ike"
    hparams_table: ClassVar[HparamsTable | None] = hparams.IKE

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


class IkeWriter(ScopeWriter[IkeConfig]):
    """Put demonstrations and the nearest fact before a prompt.

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
        """Return facts, configuration and demonstrations."""
        return {**super().settings(), "demonstrations": list(self.demonstrations)}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> IkeWriter:
        """Return the writer with this store."""
        facts = [EditRequest(**request) for request in settings["facts"]]
        config = IkeConfig.make(settings["config"])
        return cls(facts, tensors["embeddings"], config, settings["demonstrations"])

    def write(self, prompts: Sequence[str]) -> list[str]:
        """Return demonstrations, the nearest fact and the prompt; the prompt alone where no fact is in scope."""
        texts: list[str] = []
        for prompt, index in zip(prompts, self._nearest_facts(prompts), strict=True):
            if index is None:
                texts.append(prompt)
            else:
                texts.append(self.demonstrations[index] + preface(self.config, [self.facts[index]], prompt))
        return texts

    def _nearest_facts(self, prompts: Sequence[str]) -> list[int | None]:
        """Return the index of each prompt's nearest fact, None where no fact is in scope."""
        if not self.config.everywhere:
            return [next(iter(in_scope), None) for in_scope in self.in_scope(prompts)]
        if len(self.facts) == 1 or not prompts:
            return [0] * len(prompts)
        return self.likeness(prompts).argmax(-1).tolist()


class Ike:
    """Show the model, by demonstrations, how to use a new fact and when to leave it out of account."""

    name = "ike"
    Config = IkeConfig
    effect: ClassVar[type[PromptWriter]] = IkeWriter
    capabilities = Capabilities(kind="prompt", batch=True, sequential=True, needs_examples=True, needs_subject=False)
    reference = "Zheng et al., Can We Edit Factual Knowledge by In-Context Learning?, EMNLP 2023, arXiv:2305.12740"
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> PromptEdit:
        """Choose the demonstrations of each fact."""
        config: IkeConfig = context.config
        pool = context.need_examples(self.name)
        if not config.everywhere:
            _ = config.least  # refused here, not at the first prompt
        reader = Reader(view, context.encoder)
        facts = session_facts(batch, context)
        with context.stages("encode"):
            examples = _embed_examples(pool, config.encoder, reader, context)  # [examples, width]
            statements = [statement(request.text, request.target) for request in facts]
            embeddings = load_sentence_encoder(config.encoder, reader)(statements)  # [facts, width]
            texts: list[str] = []
            for chosen in choose_examples(embeddings @ examples.T, facts, pool, config.demonstrations):
                texts.append("".join(demonstration(config, pool[i], kind) for i, kind in chosen))
            if config.repeat:
                for index, request in enumerate(facts):
                    texts[index] += demonstration(config, EditRecord(request), "copy")
            writer = IkeWriter(facts, embed_facts(facts, config, reader, context), config, texts)
            check_lengths(writer, batch.requests, reader)
        return prompt_edit(writer, facts, view, context, self.name)


def choose_examples(
    likeness: Tensor, facts: Sequence[EditRequest], pool: Sequence[EditRecord], count: int
) -> list[list[tuple[int, Kind]]]:
    """Choose the examples that demonstrate each fact, and what each demonstrates.

    The most alike stands last, next to the fact.

    Args:
        likeness: ``[facts, examples]``, cosine of the statements.
        facts: what is demonstrated. An example about the very same prompt would give an answer away and is left out.
        pool: the examples.
        count: examples of one fact; fewer where there are not as many.
    """
    pool_texts = [record.request.text for record in pool]
    chosen: list[list[tuple[int, Kind]]] = []
    for cosines, request in zip(likeness, facts, strict=True):
        same_prompt = torch.tensor([text == request.text for text in pool_texts])  # [examples]
        order = cosines.masked_fill(same_prompt, -torch.inf).argsort(descending=True, stable=True)
        usable = len(pool) - int(same_prompt.sum())
        nearest: list[int] = order[: min(count, usable)].tolist()
        examples: list[tuple[int, Kind]] = []
        for rank, example in enumerate(nearest):
            examples.append((example, _KINDS[rank % len(_KINDS)]))
        examples.reverse()
        chosen.append(examples)
    return chosen


def demonstration(wording: WordingConfig, record: EditRecord, kind: Kind) -> str:
    """Return an example in the paper's template: ``New Fact: x* y*``, ``Prompt: x y`` and an empty line.

    The kind decides what stands behind ``Prompt:``. A copy has the fact itself, an update a paraphrase, and a retain
    another prompt, which keeps its answer. A record without paraphrases or neighbours can only be copied.
    """
    request = record.request
    prompt, answer = request.text, request.target
    rephrases = record.prompts_of("paraphrase")
    preserved = (*record.probes_of("neighbourhood"), *record.probes_of("locality"))
    answered = [probe for probe in preserved if probe.answers]
    if kind == "update" and rephrases:
        prompt = rephrases[0]
    if kind == "retain" and answered:
        prompt, answer = answered[0].prompt, answered[0].answers[0]
    return preface(wording, [request], statement(prompt, answer)) + "\n\n"


def _embed_examples(pool: Sequence[EditRecord], encoder: str, reader: Reader, context: MethodContext) -> Tensor:
    """Return the embeddings of the examples' statements, ``[examples, width]``; encoded once a session."""
    texts = [statement(record.request.text, record.request.target) for record in pool]
    key = ("examples", encoder, tuple(texts))
    if key not in context.memo:
        embed = load_sentence_encoder(encoder, reader)
        rows: list[Tensor] = []
        with without_edits(reader.view.model):
            for start in range(0, len(texts), _CHUNK):
                chunk = texts[start : start + _CHUNK]
                rows.append(embed(chunk))
                context.progress("examples", start + len(chunk), len(texts))
        context.memo[key] = torch.cat(rows)
    return context.memo[key]
