"""Target values: what the value projection must add at the subject so that the model says the target.

The objective is ROME's and MEMIT's (arXiv 2202.05262 eq. 4; 2210.07229 eq. 12-16): for each group of
requests a vector ``delta`` minimises the mean negative log-likelihood of the target over contexts, plus a
KL term that keeps what the model says the subject *is*, plus a penalty on its length, with a clamped norm.
All groups are optimised at once; every step, clamp and stop is a group's own, so the result is that of one
group at a time.

Two optimisers. Adam is the published one. It moves every coordinate by about the learning rate, needed or not,
which makes long vectors that disturb other prompts. Gradient descent with steps of a length relative to the
hidden state reaches a lower loss in fewer steps with a shorter vector, and needs no scale of the model's own
(figures in docs/design/0001-values-and-keys.md).

What never changes between steps is computed once: the layers up to the edited one, and keys and values of
the attention for tokens before the subject's last (a causal model cannot see ``delta`` there). Rows are laid
out so that this token stands in one common column. See :mod:`kecore.engine.replay`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kecore.api.progress import Progress, silent
from kecore.batch import Located, RequestBatch
from kecore.engine.value_rows import Row
from kecore.engine.value_steps import Coupling, MemberCoupling, ValueBatch, ValueSettings
from kecore.memory import backward_bytes, cached_bytes, logits_bytes
from kecore.model import ModelView, Output
from kecore.text import Encoder

__all__ = ["Values", "optimise_values"]

_ENOUGH = {"cpu": 320, "cuda": 4096}  # tokens that keep a few cores, or a GPU's tiles, busy
_BANK = 4096  # vectors of noise, of which every step reads others
_ESSENCE = "{} is a"  # the KL prompt of ROME, section 3.1


@dataclass(frozen=True, slots=True)
class Values:
    """The optimised vectors of ``u`` groups.

    Args:
        delta: ``[u, d_model]`` float32, to be added to the value projection's output.
        reference: ``[u]``, norm that clamp and decay are relative to.
        loss: ``[u]``, last loss.
        steps: ``[u]``, evaluations of the loss.
        mode: how the model was driven; see :class:`Replay`.
    """

    delta: Tensor
    reference: Tensor
    loss: Tensor
    steps: Tensor
    mode: str


def optimise_values(
    view: ModelView,
    batch: RequestBatch,
    layer: int,
    contexts: Sequence[str],
    settings: ValueSettings,
    *,
    seed: int = 0,
    memory: int = 2 << 30,
    progress: Progress = silent,
    coupling: Coupling | None = None,
) -> Values:
    """Optimise the values of all requests and return them.

    Args:
        view: the model; unchanged on return.
        batch: the edits; a group shares one value.
        layer: layer whose value projection is edited (the last one, if several are).
        contexts: prefixes of every prompt.
        settings: numbers of the optimisation.
        seed: seeds the noise.
        memory: bytes of activations per micro-batch.
        progress: called after each step of each micro-batch.
        coupling: a further term of the loss; values of a micro-batch then depend on each other and on the micro-batches
            before.

    Raises:
        NonFiniteError: a loss became NaN or infinite.
    """
    encoder, u = batch.encoder, len(batch.subjects)
    essences: list[Located | None] = [None] * u
    if settings.kl_weight:
        essences = [_essence(text, settings) for text in batch.about_subjects(_ESSENCE)]
    group_rows = _rows_with_target(batch, contexts)
    delta = torch.zeros(u, view.width)
    reference, loss = torch.zeros(u), torch.zeros(u)
    evaluations = torch.zeros(u, dtype=torch.long)
    mode, done = "", 0
    with view.frozen(), view.cast(settings.precision):
        bank = _noise_bank(view, encoder, contexts, layer, seed) if settings.noise else torch.empty(0)
        for groups in _micro_batches(view, group_rows, layer, memory):
            index = torch.tensor(groups)
            batch_coupling = None if coupling is None else MemberCoupling(coupling, index.to(view.device))
            values = ValueBatch(
                view,
                encoder,
                rows=_rows_of_groups(groups, group_rows, essences),
                layer=layer,
                settings=settings,
                mode=mode if mode in ("upper", "full") else None,  # what a cache gives depends on the rows
                bank=bank,
                coupling=batch_coupling,
            )
            for step in range(settings.steps):
                goes_on = values.step(last=step == settings.steps - 1)
                progress("values", done * settings.steps + (step + 1) * len(groups), u * settings.steps)
                if not goes_on:
                    break
            batch_delta = values.delta[:, : view.width]  # [b, d_model], without a second vector
            if batch_coupling is not None:
                batch_coupling.keep(batch_delta)
            delta[index], reference[index] = batch_delta.cpu(), values.reference[:, 0].cpu()
            loss[index], evaluations[index] = values.loss.cpu(), values.steps.cpu()
            mode, done = values.mode, done + len(groups)
            settings = replace(settings, graphs=values.recording)  # what failed once is not tried again
            del values  # its caches go before those of the next come
    progress("values", u * settings.steps, u * settings.steps)
    return Values(delta, reference, loss, evaluations, mode)


def _essence(text: Located, settings: ValueSettings) -> Located:
    """Return the text of the KL term, which reads the next token behind its end."""
    if settings.kl_position == "last":
        return text
    end = text.lookup + 1  # what stands behind has no influence on a causal model's answer there
    return Located(text.ids[:end], start=end, lookup=text.lookup)


def _rows_with_target(batch: RequestBatch, contexts: Sequence[str]) -> list[list[Row]]:
    """Return the rows of each group: its requests in every context."""
    in_context = [batch.located(context) for context in contexts]
    group_rows: list[list[Row]] = [[] for _ in batch.subjects]
    for request, group in enumerate(batch.groups):
        for context, located in enumerate(in_context):
            group_rows[group].append(Row(group, located[request], context))
    return group_rows


def _rows_of_groups(
    groups: Sequence[int], group_rows: Sequence[Sequence[Row]], essences: Sequence[Located | None]
) -> list[Row]:
    """Return the rows of a micro-batch: those with a target first, then those that ask what the subject is.

    Args:
        groups: the micro-batch's groups.
        group_rows: the rows with a target of every group.
        essences: the text that asks what its subject is, for every group; None without the KL term.
    """
    rows: list[Row] = []
    for index, group in enumerate(groups):
        rows += [replace(row, group=index) for row in group_rows[group]]
    for index, group in enumerate(groups):
        essence = essences[group]
        if essence is not None:
            rows.append(Row(index, essence, is_kl=True))
    return rows


@torch.no_grad()
def _noise_bank(view: ModelView, encoder: Encoder, contexts: Sequence[str], layer: int, seed: int) -> Tensor:
    """Return Gaussian noise in units of each coordinate's standard deviation over the contexts, ``[_BANK, d_model]``.

    Read by context, step and column, so that a value does not depend on the batch it is optimised in.
    """
    texts = [encoder.encode(text).ids for text in contexts if text]
    if not texts:
        return torch.zeros(1, view.width, device=view.device)
    rows = encoder.rows(texts)
    hidden = view.run(rows, taps=[Output(layer)], last=layer)[Output(layer)]  # [contexts, width, d_model]
    counted = view.tokens_read(rows)  # [contexts, width]
    if view.handover is None:
        # The first token of a text is an outlier in most models: attention rests on it.
        counted &= counted.cumsum(-1) > 1
    states = hidden[counted.to(hidden.device)].float()  # [counted tokens, d_model]
    if len(states) < 2:  # one token shows no spread
        return torch.zeros(1, view.width, device=view.device)
    deviation = states.std(0)  # [d_model]
    noise = torch.randn(_BANK, view.width, generator=torch.Generator().manual_seed(seed))
    return noise.to(deviation) * deviation


def _micro_batches(
    view: ModelView, group_rows: Sequence[Sequence[Row]], layer: int, memory: int
) -> Iterator[list[int]]:
    """Yield groups of similar length together, as many as a backward pass and its cache leave room for."""
    token_bytes, logits = backward_bytes(view, layer), logits_bytes(view)
    cached = cached_bytes(view, layer)
    enough = _ENOUGH.get(view.device.type, 1024)
    # Of each group: tokens of its longest row from the lookup on, and before it; positions whose logits are read.
    length: list[int] = []
    past: list[int] = []
    positions: list[int] = []
    for rows in group_rows:
        length.append(max(len(row.ids) - row.located.lookup for row in rows))
        past.append(max(row.located.lookup for row in rows))
        positions.append(sum(len(row.columns) for row in rows) + 1)  # one of the KL term
    batch: list[int] = []
    batch_rows = batch_past = batch_positions = 0
    for group in sorted(range(len(group_rows)), key=lambda group: length[group]):
        new_rows = len(group_rows[group]) + 1
        batch_past, batch_positions = max(batch_past, past[group]), batch_positions + positions[group]
        row_bytes = length[group] * token_bytes + batch_past * cached
        is_full = (batch_rows + new_rows) * row_bytes + batch_positions * logits > memory
        if batch:
            # Padding is wasted work; a batch that already fills the machine need not take longer rows in.
            width = length[batch[-1]]
            is_uneven = length[group] > width and batch_rows * width > enough
            if is_full or is_uneven:
                yield batch
                batch, batch_rows, batch_past, batch_positions = [], 0, past[group], positions[group]
        batch.append(group)
        batch_rows += new_rows
    yield batch
