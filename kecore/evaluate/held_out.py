"""Reading held-out text: how well a model predicts it, and whether it would write what the unedited one would.

One pass over the passages gives both: perplexity, and at every token the most probable next one. Two readings of the
same text are compared by :func:`drift`, which is what a long sequence of edits is watched by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from kecore.api.errors import ConfigError, DataFormatError
from kecore.api.progress import Progress, silent
from kecore.evaluate.intervals import interval
from kecore.inference.scoring import BATCH_TOKENS, score_tokens

if TYPE_CHECKING:
    from kecore.model import ModelView
    from kecore.text import Encoder

__all__ = ["Drift", "HeldOutText", "Reading", "drift"]


@dataclass(frozen=True, slots=True)
class Reading:
    """A model's losses on passages, and what it would write after each of their tokens.

    Args:
        losses: summed negative log-likelihood of each passage's tokens but the first, in nats.
        next_tokens: the most probable token in the place of each of these, a passage at a time; -1 where the logits
            are not finite.
    """

    losses: tuple[float, ...]
    next_tokens: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Number of tokens that were predicted."""
        return sum(map(len, self.next_tokens))

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean loss; infinite for a model whose logits are not finite."""
        mean_loss = math.fsum(self.losses) / self.tokens
        return math.exp(mean_loss) if mean_loss < 700 else math.inf


@dataclass(frozen=True, slots=True)
class HeldOutText:
    """Passages as the tokens that a model reads.

    Args:
        rows: tokens of each passage, at least two.
    """

    rows: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, encoder: Encoder, passages: Sequence[str], window: int = 256) -> HeldOutText:
        """Tokenise passages, with the special tokens that the tokenizer puts before a text; no chat template is used.

        Args:
            encoder: the model's tokenizer.
            passages: texts, each read by itself.
            window: most tokens of a passage; the rest is left out. Perplexities of different windows differ.

        Raises:
            ConfigError: the window is below 2.
            DataFormatError: no passage has two tokens.
        """
        if window < 2:
            raise ConfigError(f"the window must hold at least 2 tokens, got {window}")
        longest = min(window, encoder.max_length or window)
        rows: list[tuple[int, ...]] = []
        for text in passages:
            ids = encoder.tokenizer(text)["input_ids"][:longest]
            if len(ids) > 1:
                rows.append(tuple(ids))
        if not rows:
            raise DataFormatError("no passage has two tokens or more; perplexity needs text")
        return cls(tuple(rows))

    def read(
        self, view: ModelView, encoder: Encoder, *, batch_tokens: int = BATCH_TOKENS, progress: Progress = silent
    ) -> Reading:
        """Let a model read the text as it is now, edited or not.

        Args:
            view: the model.
            encoder: pads.
            batch_tokens: padded tokens of one micro-batch: speed and memory, not the result.
            progress: called after each micro-batch.
        """
        scores = score_tokens(view, encoder, [(row, 1) for row in self.rows], batch_tokens, progress)
        return Reading(tuple(-score.total for score in scores), tuple(score.argmax for score in scores))


@dataclass(frozen=True, slots=True)
class Drift:
    """How far a reading is from that of the unedited model.

    Args:
        perplexity: of the model as it is now.
        base_perplexity: of the unedited one.
        agreement: share of tokens after which both would write the same one, the mean over passages.
        low: lower end of its 95 % interval over passages (Wilson's, with their effective number).
        high: upper end.
        tokens: number of tokens that were compared.
    """

    perplexity: float
    base_perplexity: float
    agreement: float
    low: float
    high: float
    tokens: int

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity now, in units of the unedited model's."""
        return self.perplexity / self.base_perplexity

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; a perplexity that is not finite is null."""
        values = asdict(self)
        for name, value in values.items():
            if not math.isfinite(value):
                values[name] = None
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Drift:
        """Read :meth:`to_json`."""
        fields = dict(values)
        for name, value in values.items():
            if value is None:
                fields[name] = math.inf
        return cls(**fields)


def drift(base: Reading, now: Reading) -> Drift:
    """Compare two readings of the same text.

    Args:
        base: by the unedited model.
        now: by the model as it is now.

    Raises:
        ConfigError: they are not of the same text.
    """
    lengths = [len(tokens) for tokens in base.next_tokens]
    if lengths != [len(tokens) for tokens in now.next_tokens]:
        raise ConfigError("two readings are compared that are of different texts; read the same text twice")
    shares: list[float] = []  # a passage each
    for base_tokens, now_tokens in zip(base.next_tokens, now.next_tokens, strict=True):
        same = [one == other for one, other in zip(base_tokens, now_tokens, strict=True)]
        shares.append(same.count(True) / len(same))
    agreement = fmean(shares)
    squares = math.fsum((share - agreement) ** 2 for share in shares)
    low, high = interval(agreement, squares, len(shares), (0.0, 1.0)) or (0.0, 1.0)
    return Drift(now.perplexity, base.perplexity, agreement, low, high, base.tokens)
