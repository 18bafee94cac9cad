"""The requests of one edit, made ready once: free of repetitions and contradictions, grouped, tokenised and located.

The editor makes a :class:`RequestBatch` and hands it to a configuration's ``needs`` and to a method's ``plan``, so that
no method removes repetitions, looks for contradictions, groups by subject or tokenises by itself.

It belongs to the contract with every method, those that never touch the engine included, and needs a tokenizer and
nothing more. So it stands right above :mod:`kecore.text`; :mod:`kecore.api`, below, names it in annotations only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from kecore.api.types import EditRequest, check_conflicts, unique
from kecore.text import Encoded, Encoder, join_context

__all__ = ["Located", "RequestBatch"]


@dataclass(frozen=True, slots=True)
class Located:
    """One text about a subject as tokens, with the token that an edit acts on.

    Args:
        ids: token ids of context, prompt and target, special tokens included.
        start: index of the target's first token; ``len(ids)`` where there is no target.
        lookup: index of the subject's last token; of an encoder-decoder that of the token from which the decoder
            answers.
    """

    ids: tuple[int, ...]
    start: int
    lookup: int


class _Tokens:
    """What was tokenised so far; a batch and all views of it share one, so that each text is tokenised once."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._encoded: dict[EditRequest, Encoded] = {}
        self._located: dict[tuple[EditRequest, str], Located] = {}
        self._about: dict[tuple[str, str], Located] = {}

    def encode(self, request: EditRequest) -> Encoded:
        """Return the request's prompt with its target."""
        if request not in self._encoded:
            self._encoded[request] = self.encoder.encode(request.text, request.target)
        return self._encoded[request]

    def locate(self, request: EditRequest, context: str) -> Located:
        """Return the request's prompt with its target behind a context."""
        key = (request, context)
        if key not in self._located:
            text = join_context(context, request.text)
            # Encodings behind contexts are not kept: with their character spans they are many times as large.
            encoded = self.encoder.encode(text, request.target) if context else self.encode(request)
            start, end = request.subject_span
            shift = len(text) - len(request.text)
            lookup = self._lookup(encoded, (start + shift, end + shift))
            self._located[key] = Located(encoded.ids, encoded.start, lookup)
        return self._located[key]

    def _lookup(self, encoded: Encoded, subject_span: tuple[int, int]) -> int:
        """Return the index of the token that an edit acts on."""
        if self.encoder.handover:
            # The subject stands in the encoder. The decoder, whose layers are edited, has read of it at its first
            # token, which is the last one before the answer.
            return encoded.start - 1
        return encoded.last_token_of(subject_span)

    def locate_about(self, template: str, subject: str) -> Located:
        """Return a text about a subject, without a target."""
        key = (template, subject)
        if key not in self._about:
            encoded = self.encoder.encode(template.replace("{}", subject))
            start = template.index("{}")
            lookup = self._lookup(encoded, (start, start + len(subject)))
            self._about[key] = Located(encoded.ids, encoded.start, lookup)
        return self._about[key]


@dataclass(frozen=True)
class RequestBatch:
    """The requests of one edit as they will be edited; made by :meth:`of`, unchangeable afterwards.

    What needs the tokenizer is worked out when it is first asked for and then kept, for the views that
    :meth:`ungrouped` and :meth:`select` give as well: a method that needs no subject asks for none.

    Args:
        requests: the requests without repetitions, in the order they came.
        groups: the group of each request, counted from 0 in order of appearance. Requests about one subject are one
            group: they share one key, so they must share one value. Solving them apart gives one key several values,
            of which none is written (MEMIT-Merge, arXiv 2502.07322).
        tokens: what was tokenised so far.

    Examples:
        >>> batch = RequestBatch.of(requests, editor.encoder)                       # doctest: +SKIP
        >>> [item.ids[item.lookup] for item in batch.located("I said")]             # doctest: +SKIP
    """

    requests: tuple[EditRequest, ...]
    groups: tuple[int, ...]
    tokens: _Tokens = field(repr=False, compare=False)

    @classmethod
    def of(cls, requests: Iterable[EditRequest], encoder: Encoder) -> RequestBatch:
        """Make a batch of requests as a user gives them.

        Args:
            requests: the requests; those that are given twice count once.
            encoder: text to tokens.

        Raises:
            RequestConflictError: two requests contradict each other.
            RequestError: there are none.
        """
        requests = list(requests)
        check_conflicts(requests)
        return cls._grouped(unique(requests), _Tokens(encoder))

    @classmethod
    def _grouped(cls, requests: Sequence[EditRequest], tokens: _Tokens) -> RequestBatch:
        groups: dict[str, int] = {}
        group_of_request: list[int] = []
        for request in requests:
            # A decoder's key depends on the whole prompt, a subject's key on the subject alone.
            shares_key = request.subject if not tokens.encoder.handover else None
            group_of_request.append(groups.setdefault(shares_key or request.text, len(groups)))
        return cls(tuple(requests), tuple(group_of_request), tokens)

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def encoder(self) -> Encoder:
        """What turns text to tokens."""
        return self.tokens.encoder

    @cached_property
    def subjects(self) -> tuple[str, ...]:
        """The subject of each group; the prompt of a request without one."""
        subject_of_group: dict[int, str] = {}
        for group, request in zip(self.groups, self.requests, strict=True):
            subject_of_group[group] = request.subject or request.text
        return tuple(subject_of_group[group] for group in range(len(subject_of_group)))

    @cached_property
    def encodings(self) -> tuple[Encoded, ...]:
        """Each request's prompt with its target.

        Raises:
            PromptTooLongError: one does not fit into the model's context.
            RequestError: a target has no tokens.
        """
        return tuple(self.tokens.encode(request) for request in self.requests)

    @property
    def lookups(self) -> tuple[int, ...]:
        """Index of the subject's last token in each of :attr:`encodings`."""
        return tuple(item.lookup for item in self.located())

    def located(self, context: str = "") -> tuple[Located, ...]:
        """Return each request's prompt with its target behind a context, and where its subject ends.

        Args:
            context: a text to be put before the prompts, as :func:`kecore.text.join_context` does; none by default.

        Raises:
            PromptTooLongError: one does not fit into the model's context.
            RequestError: a target has no tokens.
            TokenizerError: the tokenizer drops a subject.
        """
        return tuple(self.tokens.locate(request, context) for request in self.requests)

    def about_subjects(self, template: str) -> tuple[Located, ...]:
        """Return a text about the subject of each group, without a target, and where the subject ends in it.

        Args:
            template: text with one ``{}`` for the subject, such as ``"{} is a"``.

        Raises:
            PromptTooLongError: one does not fit into the model's context.
            TokenizerError: the tokenizer drops a subject.
        """
        return tuple(self.tokens.locate_about(template, subject) for subject in self.subjects)

    def ungrouped(self) -> RequestBatch:
        """Return the same requests, each a group of its own."""
        return RequestBatch(self.requests, tuple(range(len(self.requests))), self.tokens)

    def select(self, indices: Iterable[int]) -> RequestBatch:
        """Return some of the requests, in this order, grouped by subject."""
        return self._grouped([self.requests[index] for index in indices], self.tokens)
