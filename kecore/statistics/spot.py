"""Compares second moments of keys with a few fresh keys of a model: are they of this model and these layers?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kecore import data
from kecore.api.progress import Progress, silent
from kecore.corpus import Corpus
from kecore.model import ModelView, SiteId
from kecore.statistics.collect import pack_rows, run_keys, sample_text, tokens_per_pass
from kecore.statistics.moments import SEQUENCE
from kecore.text import Encoder

__all__ = ["BOUND", "SCALE_BOUND", "SPOT_TOKENS", "SpotCheck", "spot_check"]

BOUND = 0.6
"""Largest difference of a :class:`SpotCheck` that is taken for the same layer of the same model; docs/share.md says how
it was found."""

SCALE_BOUND = 2.0
"""Largest factor between the sizes of the moments that is accepted; a sum taken for a mean is far beyond it."""

SPOT_TOKENS = 2048
"""Tokens whose keys imported moments are compared with."""


@dataclass(frozen=True, slots=True)
class SpotCheck:
    """How far a moment is from fresh keys of a layer.

    Args:
        difference: 1 minus Spearman's rank correlation, over neurons, between the mean squares of the fresh keys and
            the moment's diagonal: 0 where the neurons fire in the same order of strength, about 1 for strangers.
        scale: median over neurons of the fresh mean square divided by the moment's.
    """

    difference: float
    scale: float

    def holds(self, bound: float = BOUND) -> bool:
        """Return whether the moment may be one of this layer; never for NaN."""
        return self.difference <= bound and 1 / SCALE_BOUND <= self.scale <= SCALE_BOUND


def spot_check(
    view: ModelView,
    encoder: Encoder,
    moments: Mapping[SiteId, Tensor],
    *,
    text: Corpus | None = None,
    tokens: int = SPOT_TOKENS,
    memory: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[SiteId, SpotCheck]:
    """Compare moments with keys of the model on a little text.

    The keys of a layer are activations of its neurons, and which of them fire strongly is the mark of the layer. Only
    the order counts, so the few neurons with huge activations at the beginning of texts, of which every tool counts
    another share, decide nothing; a trace or a norm would follow them.

    Args:
        view: the unedited model.
        encoder: its tokenizer.
        moments: site to ``[d_in, d_in]``, of dense layers.
        text: natural text, by default the sample that kecore ships.
        tokens: how many tokens of it.
        memory: bytes of activations per pass.
        seed: seeds the choice of passages.
        progress: called with tokens done.

    Returns:
        The comparison at each site.

    Raises:
        DataFormatError: the text cannot be read.
    """
    sample = sample_text(text or Corpus.of(data.path(data.TEXT)), tokens, seed)
    sites = sorted(moments)
    length = min(SEQUENCE, view.max_length or SEQUENCE)
    squares = {site: torch.zeros(view.site(site).linear.d_in, dtype=torch.float64) for site in sites}  # sums, [d_in]
    done = 0
    rows_per_pass = max(1, tokens_per_pass(view, [site.layer for site in sites], memory) // length)
    progress("spot check", 0, tokens)
    with view.frozen(), torch.no_grad():
        for batch in _batches(pack_rows(encoder, sample.passages, length, tokens), rows_per_pass):
            states = run_keys(view, sites, batch)
            for site, keys in states.keys.items():
                squares[site] += keys[states.is_real.to(keys.device)].float().square().sum(0).double().cpu()
            done += int(states.is_real.sum())
            progress("spot check", min(done, tokens), tokens)
    checks: dict[SiteId, SpotCheck] = {}
    for site in sites:
        checks[site] = _compare(moments[site].diagonal(), squares[site] / max(1, done))
    return checks


def _batches(rows: Iterator[list[int]], size: int) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _compare(there: Tensor, here: Tensor) -> SpotCheck:
    """Compare two vectors of mean squares, ``[d_in]`` each."""
    correlation = torch.corrcoef(torch.stack([_ranks(there), _ranks(here)]))[0, 1]
    fires = (there > 0) & (here > 0)
    scale = (here[fires] / there[fires]).median() if bool(fires.any()) else torch.tensor(float("nan"))
    return SpotCheck(1 - float(correlation), float(scale))


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of each value, ``[d]``; equal ones, such as neurons that never fire, share their mean rank."""
    _, group, sizes = values.unique(return_inverse=True, return_counts=True)  # sizes: [groups], group: [d]
    last_rank = sizes.cumsum(0).double()
    return (last_rank - (sizes - 1) / 2)[group]
