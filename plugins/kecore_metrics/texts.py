"""Metrics of free text: how varied it is, and how close it comes to reference texts.

Fluency and consistency are those of ROME (arXiv 2202.05262, section 3.3, there after Zhang et al., arXiv 1809.05972),
ROUGE-L that of Lin (2004), BERTScore that of Zhang et al. (arXiv 1904.09675). Libraries other than kecore's own
dependencies are loaded when a metric asks for them: ``pip install 'kecore[metrics]'``.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from itertools import chain
from statistics import fmean
from typing import Any

from kecore import data
from kecore.api.errors import MissingDependencyError, ModelLoadError
from kecore.corpus import Corpus
from kecore.evaluate import AnsweredProbe, Metric, Protocol
from kecore.evaluate.metrics import SIGNED, UNIT
from kecore.text import separator

__all__ = [
    "BERTSCORE",
    "CONSISTENCY",
    "FLUENCY",
    "ROUGE",
    "bert_score",
    "fluency",
    "ngram_entropy",
    "rouge_l",
    "tfidf_similarity",
    "words",
]

BERTSCORE_MODEL = "microsoft/deberta-xlarge-mnli"
"""The encoder that BERTScore's authors recommend for English."""


def words(text: str) -> list[str]:
    """Return a text's words, and each punctuation mark and each character of a script without spaces by itself.

    Examples:
        >>> words("It's in Rome, 罗马")
        ['It', "'", 's', 'in', 'Rome', ',', '罗', '马']
    """
    spaced: list[str] = []
    for character in unicodedata.normalize("NFC", text):
        if character.isalnum() and not _is_wide(character):
            spaced.append(character)
        else:
            spaced.append(f" {character} ")
    return "".join(spaced).split()


def _is_wide(character: str) -> bool:
    """Return whether a character is of a script that is written without spaces, as East Asian ones are."""
    return unicodedata.east_asian_width(character) in "WF"


def ngram_entropy(tokens: Sequence[str], n: int) -> float:
    """Return the entropy of the n-grams' frequencies, in bits; 0 where there are fewer than two kinds."""
    shifted = [tokens[i:] for i in range(n)]
    counts = Counter(zip(*shifted, strict=False))
    total = counts.total()
    frequencies = [count / total for count in counts.values()]
    return -math.fsum(frequency * math.log2(frequency) for frequency in frequencies) + 0.0  # of one kind 0, not -0


def fluency(text: str) -> float:
    """Return 2/3 of the bigrams' entropy and 4/3 of the trigrams', on average, in bits (ROME's GE, printed x 100)."""
    tokens = words(text)
    return fmean((ngram_entropy(tokens, 2) * 2 / 3, ngram_entropy(tokens, 3) * 4 / 3))


def _passage(probe: AnsweredProbe) -> str:
    text = probe.text or ""
    return probe.prompt + separator(probe.prompt, text) + text


def _fluency(probe: AnsweredProbe, protocol: Protocol) -> float | None:
    return None if probe.text is None else fluency(_passage(probe))


def _need(module: str, metric: str) -> MissingDependencyError:
    return MissingDependencyError(f"the metric '{metric}' needs {module}: pip install 'kecore[metrics]'")


@cache
def _weights() -> tuple[Any, Any]:
    """Make word counts by hash, and their inverse document frequencies over the bundled Wikipedia passages.

    Hashing keeps words that the passages lack (names, above all): they get the weight of the rarest.
    """
    try:
        from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise _need("scikit-learn", "consistency") from error
    options: dict[str, Any] = {"analyzer": _lower, "norm": None}  # allowed, but missing in the signature's types
    counts = HashingVectorizer(n_features=2**20, alternate_sign=False, **options)
    passages = list(Corpus.of(data.path("wikipedia_sample.jsonl.gz")).passages())
    return counts, TfidfTransformer(smooth_idf=True).fit(counts.transform(passages))


def _lower(text: str) -> list[str]:
    return words(text.casefold())


def tfidf_similarity(text: str, references: str) -> float:
    """Return the cosine of two texts' tf-idf vectors, in [0, 1].

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    counts, weights = _weights()
    text_row, references_row = weights.transform(counts.transform([text, references]))  # rows of length 1, or 0
    return float(text_row.multiply(references_row).sum())


def _consistency(groups: Sequence[Sequence[AnsweredProbe]], protocol: Protocol) -> list[list[float | None]]:
    """Return one number a record: all its passages together against all its references."""
    values: list[list[float | None]] = []
    for group in groups:
        value = None
        if group and group[0].answers:
            value = tfidf_similarity(" ".join(map(_passage, group)), " ".join(group[0].answers))
        values.append([value] * len(group))
    return values


def rouge_l(text: str, reference: str) -> float:
    """Return F1 of the longest common subsequence of words, in [0, 1].

    Raises:
        MissingDependencyError: torchmetrics is not installed.
    """
    try:
        from torchmetrics.functional.text import rouge_score  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise _need("torchmetrics", "rouge") from error
    # The library's own words are Latin letters and digits only.
    scores = rouge_score(text, reference, rouge_keys="rougeL", normalizer=str, tokenizer=_lower)
    return float(scores["rougeL_fmeasure"])


def _rouge(groups: Sequence[Sequence[AnsweredProbe]], protocol: Protocol) -> list[list[float | None]]:
    return [list(map(_best_rouge, group)) for group in groups]


def _best_rouge(probe: AnsweredProbe) -> float | None:
    if probe.text is None or not probe.answers:
        return None
    return max(rouge_l(probe.text, answer) for answer in probe.answers)


def bert_score(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return F1 of greedily matched contextual embeddings, without rescaling, in [-1, 1]; one number a pair.

    Raises:
        MissingDependencyError: torchmetrics is not installed.
        ModelLoadError: the encoder :data:`BERTSCORE_MODEL` is not at hand.
    """
    try:
        from torchmetrics.functional.text import bert_score as score  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise _need("torchmetrics", "bertscore") from error
    try:
        scores: Any = score(list(texts), list(references), model_name_or_path=BERTSCORE_MODEL, truncation=True)
    except OSError as error:
        raise ModelLoadError(
            f"BERTScore's encoder {BERTSCORE_MODEL} cannot be loaded ({error}); download it once, or leave 'bertscore' "
            "out of the protocol's extra metrics"
        ) from error
    values = scores["f1"]
    if not hasattr(values, "__len__") or not values.ndim:
        return [float(values)]  # of a single pair some versions return a number
    return [float(value) for value in values]


def _bert_score(groups: Sequence[Sequence[AnsweredProbe]], protocol: Protocol) -> list[list[float | None]]:
    texts: list[str] = []
    answers: list[str] = []
    for probe in chain.from_iterable(groups):
        if probe.text:
            texts += [probe.text] * len(probe.answers)
            answers += probe.answers
    remaining = iter(bert_score(texts, answers) if texts else [])
    values: list[list[float | None]] = []
    for group in groups:
        best: list[float | None] = []
        for probe in group:
            scores = [next(remaining) for _ in probe.answers] if probe.text else []
            best.append(max(scores, default=None))
        values.append(best)
    return values


_SUBSEQUENCE = "F1 of the longest common subsequence of words of the free text and the"
_EMBEDDINGS = "F1 of matched contextual embeddings of the free text and the"
_rouge_l = partial(Metric, whole=_rouge, reads=("text",), bounds=UNIT, lacks="no text or no answer")
_bert = partial(Metric, whole=_bert_score, reads=("text",), bounds=SIGNED, lacks="no text or no answer")

FLUENCY = Metric(
    "fluency", "generation", _fluency, reads=("text",), core=True, bounds=(0.0, math.inf), lacks="no free text",
    meaning="n-gram entropy of free text in bits",
)  # fmt: skip
CONSISTENCY = Metric(
    "consistency", "generation", whole=_consistency, reads=("text",), heading="consist.", core=True, bounds=UNIT,
    lacks="no reference texts", meaning="likeness of free text about the subject to texts about the target",
)  # fmt: skip
ROUGE = (
    _rouge_l("rouge_l", "edit", heading="ROUGE-L", core=True, meaning=f"{_SUBSEQUENCE} target"),
    _rouge_l("paraphrase_rouge_l", "paraphrase", meaning=f"{_SUBSEQUENCE} target, on paraphrases"),
    _rouge_l("portability_rouge_l", "portability", meaning=f"{_SUBSEQUENCE} answer that follows from the edit"),
)
BERTSCORE = (
    _bert("bertscore", "edit", heading="BERTScore", core=True, meaning=f"{_EMBEDDINGS} target"),
    _bert("paraphrase_bertscore", "paraphrase", meaning=f"{_EMBEDDINGS} target, on paraphrases"),
    _bert("portability_bertscore", "portability", meaning=f"{_EMBEDDINGS} answer that follows from the edit"),
)
