"""Context prefixes: short texts put before a prompt, so that an edit does not hang on one wording.

Sampled from the model itself, as ROME does (arXiv 2202.05262, section 3.1), but from a generator that
belongs to the call: the same seed and model give the same contexts. They are those of the unedited model, whatever is
on it, so that the edits of a session share them and a session that goes on elsewhere has the same. They are kept on
disk under a digest of its weights, its tokenizer and all else that they depend on: for a single fact, writing them
takes a sixth of the time.
"""

from __future__ import annotations

import hashlib
import json

import torch

from kecore.api.method import MethodContext
from kecore.edit import without_edits
from kecore.files import load_or_make
from kecore.inference.decoding import Decoding
from kecore.model import ModelView
from kecore.text import Encoder

__all__ = ["context_lengths", "of_session", "sample"]

_OPENINGS = ("The", "Therefore", "Because", "I", "You")
_TOP_K = 5
_METHOD = 1  # rises when the same arguments give other contexts
_WORTH_KEEPING = 1 << 24  # parameters; smaller models write contexts as quickly as they are read


@torch.no_grad()
def sample(view: ModelView, encoder: Encoder, count: int, tokens: int | tuple[int, ...], seed: int) -> tuple[str, ...]:
    """Return the empty context and ``count`` sampled ones.

    Args:
        view: the model that writes the contexts.
        encoder: its tokenizer; contexts are always sampled as plain text.
        count: number of sampled contexts.
        tokens: length of each in tokens; of several lengths, each goes to an equal share of the contexts, in order.
        seed: seeds the top-5 sampling.
    """
    if count == 0:
        return ("",)
    plain = Encoder(encoder.tokenizer)
    generator = torch.Generator().manual_seed(seed)
    openings = [_OPENINGS[index % len(_OPENINGS)] for index in range(count)]
    opening_ids = [list(plain.encode(opening).ids) for opening in openings]
    decoding = Decoding(view, plain.rows(opening_ids, [len(ids) - 1 for ids in opening_ids]))
    sampled: list[list[int]] = [[] for _ in openings]
    lengths = context_lengths(count, tokens)
    for step in range(max(lengths)):
        best, ids = decoding.logits().float().cpu().topk(_TOP_K)  # [count, _TOP_K] each
        chosen = ids.gather(1, torch.multinomial(best.softmax(-1), 1, generator=generator)).flatten()  # [count]
        for row, token in zip(sampled, chosen.tolist(), strict=True):
            row.append(int(token))
        if step + 1 < max(lengths):
            decoding.append(chosen)
    contexts = [""]
    for opening, row, length in zip(openings, sampled, lengths, strict=True):
        text = opening + plain.tokenizer.decode(row[:length], skip_special_tokens=True)
        # Braces would collide with the subject's slot, and line breaks end a prompt for some models.
        contexts.append(" ".join(text.replace("{", " ").replace("}", " ").split()))
    return tuple(contexts)


def context_lengths(count: int, tokens: int | tuple[int, ...]) -> list[int]:
    """Return the length of each of ``count`` contexts: ``(5, 10)`` gives the first half 5 tokens, the other 10."""
    lengths = (tokens,) if isinstance(tokens, int) else tokens
    return [lengths[index * len(lengths) // count] for index in range(count)]


def of_session(view: ModelView, context: MethodContext, count: int, tokens: int | tuple[int, ...]) -> tuple[str, ...]:
    """Return the contexts that all edits of a session share, and all sessions on the same unedited model.

    Args:
        view: the model that writes the contexts, frozen by the caller.
        context: holds tokenizer, seed and what earlier edits sampled.
        count: number of sampled contexts.
        tokens: length of each in tokens, or several; see :func:`sample`.
    """
    key = ("contexts", count, tokens, context.seed)
    if key not in context.memo:
        context.memo[key] = _of_model(view, context, count, tokens)
    return context.memo[key]


def _of_model(view: ModelView, context: MethodContext, count: int, tokens: int | tuple[int, ...]) -> tuple[str, ...]:
    def sample_unedited() -> tuple[str, ...]:
        with without_edits(view.model):
            return sample(view, context.encoder, count, tokens, context.seed)

    def sample_as_tensors() -> dict[str, torch.Tensor]:
        text = json.dumps(sample_unedited()).encode()
        return {"texts": torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    large = sum(parameter.numel() for parameter in view.model.parameters()) >= _WORTH_KEEPING
    if context.base is None or not count or not large:
        return sample_unedited()
    base = context.base
    # Another device or version of torch rounds otherwise, and so may choose another token.
    origin = (_METHOD, base.digests[base.dtype], type(view.model).__name__, view.device.type, torch.__version__)
    digest = hashlib.sha256(repr((*origin, count, tokens, context.seed)).encode())
    digest.update(context.encoder.tokenizer.backend_tokenizer.to_str().encode())
    stored = load_or_make("contexts", digest.hexdigest()[:32], "contexts", sample_as_tensors)
    return tuple(json.loads(stored["texts"].numpy().tobytes()))
