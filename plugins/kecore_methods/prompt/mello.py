"""MeLLo: a question is taken apart hop by hop, and each hop's answer is held against the store of facts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from kecore.api.errors import EditStateError
from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import PromptEdit, PromptWriter, Reader
from kecore.engine.session_facts import session_facts
from kecore.inference import generate
from kecore.model import ModelView
from kecore_methods.prompt.store import EncoderConfig, StoreWriter, embed_facts
from kecore_methods.prompt.wording import prompt_edit, statement

__all__ = ["DEMONSTRATIONS", "Mello", "MelloConfig", "MelloWriter"]

_SUBQUESTION = re.compile(r"^Subquestion: *(.+)$", re.MULTILINE)
_RETRIEVED, _FINAL = "Retrieved fact:", "Final answer:"

_AGREES = "Retrieved fact does not contradict to generated answer, so the intermediate answer is:"
_DIFFERS = "Retrieved fact contradicts to generated answer, so the intermediate answer is:"

DEMONSTRATIONS = (
    f"""Question: In which country was the author of The Trial born?
Subquestion: Who is the author of The Trial?
Generated answer: The author of The Trial is Franz Kafka.
Retrieved fact: The author of The Trial is Jane Austen.
{_DIFFERS} Jane Austen
Subquestion: In which country was Jane Austen born?
Generated answer: Jane Austen was born in England.
Retrieved fact: Jane Goodall was born in the city of Lima.
{_AGREES} England
Final answer: England
""",
    f"""Question: What is the official language of the country where the Louvre is located?
Subquestion: In which country is the Louvre located?
Generated answer: The Louvre is located in France.
Retrieved fact: The Prado Museum is located in the country of Chile.
{_AGREES} France
Subquestion: What is the official language of France?
Generated answer: The official language of France is French.
Retrieved fact: The official language of France is Finnish.
{_DIFFERS} Finnish
Final answer: Finnish
""",
    f"""Question: On which continent is the capital of the country that Pelé is a citizen of?
Subquestion: What is the country of citizenship of Pelé?
Generated answer: Pelé is a citizen of Brazil.
Retrieved fact: Pelé is a citizen of Kenya.
{_DIFFERS} Kenya
Subquestion: What is the capital of Kenya?
Generated answer: The capital of Kenya is Nairobi.
Retrieved fact: The capital of Norway is Quito.
{_AGREES} Nairobi
Subquestion: On which continent is Nairobi?
Generated answer: Nairobi is in Africa.
Retrieved fact: Nairobi is located in the continent of Europe.
{_DIFFERS} Europe
Final answer: Europe
""",
    f"""Question: Who is the head of the company that makes the Game Boy?
Subquestion: Which company makes the Game Boy?
Generated answer: The Game Boy is made by Nintendo.
Retrieved fact: The iPod is made by the company Bosch.
{_AGREES} Nintendo
Subquestion: Who is the head of Nintendo?
Generated answer: The head of Nintendo is Shuntaro Furukawa.
Retrieved fact: The head of Nintendo is Angela Merkel.
{_DIFFERS} Angela Merkel
Final answer: Angela Merkel
""",
)
"""Worked questions in the format of the paper's appendix F, with content of kecore's own."""


class MelloConfig(EncoderConfig):
    """Configuration of MeLLo."""

    hops: int = Field(default=4, ge=1, description="Most subquestions of one question.")
    demonstrations: int = Field(
        default=len(DEMONSTRATIONS), ge=0, le=len(DEMONSTRATIONS), description="Worked questions before each question."
    )
    new_tokens: int = Field(
        default=64, ge=8, description="Longest text that the model writes between two retrieved facts, in tokens."
    )


class MelloWriter(StoreWriter[MelloConfig]):
    """Lets the model take a question apart, with a stored fact after each of its answers.

    What the model is to read for a question is all of this up to ``Final answer:``, so that it goes on with the answer.
    """

    Config = MelloConfig

    def write(self, prompts: Sequence[str]) -> list[str]:
        """Return each question with the model's chain of subquestions, and the facts retrieved for them."""
        texts = [self.opening(prompt) for prompt in prompts]
        running = list(range(len(texts)))  # indices of the texts whose chain goes on
        for hop in range(self.config.hops + 1):
            subquestions: dict[int, str] = {}  # by text
            continuations = self._write_on([texts[index] for index in running])
            for index, continuation in zip(running, continuations, strict=True):
                # What the model writes behind the marks is not its to say: the store retrieves, the answer comes later.
                thought, retrieves, _ = continuation.partition(_RETRIEVED)
                before_answer, answers, _ = thought.partition(_FINAL)
                questions = _SUBQUESTION.findall(before_answer)
                if answers:
                    texts[index] = _end_line(texts[index] + before_answer)
                elif retrieves and questions and hop < self.config.hops:
                    texts[index] = _end_line(texts[index] + thought)
                    subquestions[index] = questions[-1]
            running = list(subquestions)
            if not running:
                break
            facts = self._nearest_facts(list(subquestions.values()))
            for index, fact_text in zip(running, facts, strict=True):
                texts[index] += f"{_RETRIEVED} {fact_text}.\n"
        return [text + _FINAL for text in texts]

    def opening(self, question: str) -> str:
        """Return the worked questions and the new one."""
        demonstrations = DEMONSTRATIONS[: self.config.demonstrations]
        return "".join(f"{text}\n" for text in demonstrations) + f"Question: {question}\n"

    def _write_on(self, texts: Sequence[str]) -> list[str]:
        """Return what the model writes next, until it is out of tokens.

        Raises:
            EditStateError: the writer knows no model.
        """
        if self.reader is None:
            raise EditStateError(
                "this edit lets the edited model take questions apart: pass "
                "`written(model, prompts, Reader(view, encoder))`"
            )
        generations = generate(self.reader.view, self.reader.encoder, texts, max_new_tokens=self.config.new_tokens)
        return [generation.text for generation in generations]

    def _nearest_facts(self, questions: Sequence[str]) -> list[str]:
        """Return the stored fact that is most like each question; there is always one, related or not."""
        indices: list[int] = self.likeness(questions).argmax(-1).tolist()
        return [statement(self.facts[index].text, self.facts[index].target) for index in indices]


class Mello:
    """Answer questions of several hops with stored facts, by a chain of subquestions."""

    name = "mello"
    Config = MelloConfig
    effect: ClassVar[type[PromptWriter]] = MelloWriter
    capabilities = Capabilities(kind="prompt", batch=True, sequential=True, needs_subject=False)
    reference = (
        "Zhong et al., MQuAKE: Assessing Knowledge Editing in Language Models via Multi-Hop Questions, EMNLP 2023, "
        "arXiv:2305.14795"
    )
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> PromptEdit:
        """Put the facts into the store."""
        config: MelloConfig = context.config
        reader = Reader(view, context.encoder)
        facts = session_facts(batch, context)
        with context.stages("encode"):
            writer = MelloWriter(facts, embed_facts(facts, config, reader, context), config)
        for request in batch.requests:
            context.encoder.encode(writer.opening(request.text), request.target)
        return prompt_edit(writer, facts, view, context, self.name)


def _end_line(text: str) -> str:
    """Return the text with one line break at its end."""
    return f"{text.rstrip()}\n"
