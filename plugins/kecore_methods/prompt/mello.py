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
from kecore.inference import generate
from kecore.model import ModelView
from kecore_methods.prompt.store import EncoderConfig, StoreWriter, embedded
from kecore_methods.prompt.wording import fact, prompt_edit, remembered

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
        """Each question with the model's chain of subquestions, and the facts that were retrieved for them."""
        texts = [self.opening(prompt) for prompt in prompts]
        running = list(range(len(texts)))
        for hop in range(self.config.hops + 1):
            going: list[tuple[int, str]] = []
            for place, said in zip(running, self._continued([texts[place] for place in running]), strict=True):
                thought, asks, _ = said.partition(_RETRIEVED)
                before, done, _ = thought.partition(_FINAL)
                questions = _SUBQUESTION.findall(before)
                if done:
                    texts[place] = _line(texts[place] + before)
                elif asks and questions and hop < self.config.hops:
                    texts[place] = _line(texts[place] + thought)
                    going.append((place, questions[-1]))
            for (place, _), found in zip(going, self._nearest([question for _, question in going]), strict=True):
                texts[place] += f"{_RETRIEVED} {found}.\n"
            running = [place for place, _ in going]
            if not running:
                break
        return [text + _FINAL for text in texts]

    def opening(self, question: str) -> str:
        """Worked questions and the new one."""
        shown = DEMONSTRATIONS[: self.config.demonstrations]
        return "".join(f"{text}\n" for text in shown) + f"Question: {question}\n"

    def _continued(self, texts: Sequence[str]) -> list[str]:
        """What the model writes next, until it is out of tokens."""
        if self.reader is None:
            raise EditStateError(
                "this edit lets the edited model take questions apart: pass "
                "`written(model, prompts, Reader(view, encoder))`"
            )
        made = generate(self.reader.view, self.reader.encoder, texts, max_new_tokens=self.config.new_tokens)
        return [item.text for item in made]

    def _nearest(self, questions: Sequence[str]) -> list[str]:
        """The stored fact that is most like each question; there is always one, related or not."""
        places: list[int] = self.likeness(questions).argmax(-1).tolist() if questions else []
        return [fact(self.facts[place].text, self.facts[place].target) for place in places]


class Mello:
    """Answer questions of several hops with stored facts, by a chain of subquestions."""

    name = "mello"
    Config = MelloConfig
    effect: ClassVar[type[PromptWriter]] = MelloWriter
    capabilities = Capabilities(kind="prompt", batch=True, sequential=True)
    reference = (
        "Zhong et al., MQuAKE: Assessing Knowledge Editing in Language Models via Multi-Hop Questions, EMNLP 2023, "
        "arXiv:2305.14795"
    )
    api = (2, 2)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> PromptEdit:
        """Put the facts into the store."""
        config: MelloConfig = context.config
        reader = Reader(view, context.encoder)
        facts = remembered(batch, context)
        with context.stages("encode"):
            writer = MelloWriter(facts, embedded(facts, config, reader, context), config)
        for request in batch.requests:
            context.encoder.encode(writer.opening(request.text), request.target)
        return prompt_edit(writer, facts, view, context, self.name)


def _line(text: str) -> str:
    """The text with the end of its last line."""
    return f"{text.rstrip()}\n"
