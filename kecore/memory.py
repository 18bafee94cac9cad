"""What an edit takes in memory, worked out from shapes before it begins, and kept within a budget.

One meaning of *budget* everywhere (``Editor(memory=...)``, ``kecore edit --memory``): the most bytes that the process
holds at one time on the model's device, which is main memory on a CPU: program, weights, and everything that an edit
adds. What is memory-mapped from disk (key statistics, their factors) is counted while it is in use, although the
system may drop such pages at any time. Every stage can run in micro-batches, so a budget decides speed, not results.

Estimates are upper bounds; ``benchmarks/memory.py`` compares them with what is measured.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kecore.api.errors import KecoreWarning, MemoryBudgetError
from kecore.api.identity import type_name

if TYPE_CHECKING:
    from kecore.model import ModelView

__all__ = [
    "MemoryPlan",
    "Need",
    "Work",
    "backward_bytes",
    "cached_bytes",
    "cached_share",
    "cast_bytes",
    "forward_bytes",
    "free_bytes",
    "logits_bytes",
    "make_plan",
    "measure_held",
    "pass_tokens",
    "peak_bytes",
    "reset_peak",
    "resident_bytes",
    "scoring_need",
    "vocabulary_size",
]

_WIDTHS = (8, 5)  # tensors of residual width and of key width that live at the same time in one layer
_ENOUGH = 2 << 30  # bytes of activations beyond which a micro-batch is no quicker on a CPU
_PASS = {"cpu": 2048, "cuda": 8192}  # tokens at a time of a pass without gradients
_SHARE = 0.75  # of what is free that is taken unless a budget is given
_USABLE = 0.85  # of the room that is left for micro-batches; the allocator keeps the rest in pieces
_LOGITS = 4  # copies of a row of logits: as they come, in float32, their exponentials, and what is picked from them
_TOKENS_PER_LOGITS = 8  # tokens for which one row of logits is scored


def forward_bytes(view: ModelView) -> int:
    """Return the bytes of activations that one token takes in a pass without gradients."""
    residual, key = _WIDTHS
    # Four bytes: norms and rotations work in float32 whatever the model's type is.
    return 4 * (residual * view.width + key * _key_width(view))


def pass_tokens(view: ModelView) -> int:
    """Return the most tokens that a pass without gradients runs at a time, however much memory there is.

    With more, buffers outgrow what a CPU's allocator keeps, and pages are faulted in anew: keys took 1.5 times as long.
    """
    return _PASS.get(view.device.type, _PASS["cpu"])


def cast_bytes(view: ModelView, dtype: torch.dtype | None) -> dict[str, int]:
    """Return the bytes that :meth:`ModelView.cast` takes, by name; nothing where no weight is of another type."""
    if dtype is None:
        return {}
    count = 0
    for parameter in view.model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            count += parameter.numel()
    return {f"weights in {type_name(dtype)}": count * dtype.itemsize} if count else {}


def backward_bytes(view: ModelView, layer: int, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of activations that one token takes in a pass above ``layer`` that stores them for its gradient.

    Measured on ten architectures: 0.45 to 0.97 of this is kept, the rest is room for what comes and goes.
    """
    residual, key = _WIDTHS
    size = (dtype or view.dtype).itemsize
    return size * (residual * view.width + key * _key_width(view)) * max(1, len(view.layers) - layer)


def cached_bytes(view: ModelView, layer: int, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of one token in a cache of keys and values for the layers above ``layer``.

    Where they are as wide as the residual stream; of grouped heads they are narrower, which leaves room for the copy
    that attention makes of them beside a row's own.
    """
    return 2 * view.width * max(1, len(view.layers) - layer) * (dtype or view.dtype).itemsize


def cached_share(view: ModelView) -> float:
    """Return what a token in a cache takes, as a share of what a token takes that is scored or generated."""
    return cached_bytes(view, 0) / scoring_need(view, 1).token


def vocabulary_size(view: ModelView) -> int:
    """Return how many logits one position has."""
    weight: Any = view.unembedding.weight
    return int(weight.shape[0])


def logits_bytes(view: ModelView) -> int:
    """Return the bytes that the logits of one position take while they are scored."""
    return 4 * _LOGITS * vocabulary_size(view)


def _key_width(view: ModelView) -> int:
    widths = [view.width]
    for layer in view.layers:
        at_once = 1 if layer.experts is None else layer.experts.top_k
        widths += [at_once * site.linear.d_in for site in layer.sites]
    return max(widths)


def measure_held(view: ModelView) -> dict[str, int]:
    """Measure the bytes that are on the model's device already: its weights, and the program around them."""
    tensors: list[nn.Parameter | torch.Tensor] = [*view.model.parameters(), *view.model.buffers()]
    weights = sum(t.numel() * t.element_size() for t in tensors if t.device == view.device)
    return {"weights": weights, "program": max(0, resident_bytes(view.device) - weights)}


def resident_bytes(device: torch.device) -> int:
    """Return the bytes that this process holds on a device now; 0 where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:  # not Linux
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(device: torch.device) -> int | None:
    """Return the most bytes that this process has held on a device since :func:`reset_peak`, or else since it began.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        # Not getrusage, whose maximum a child inherits from the process that started it.
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass  # not Linux
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def reset_peak(device: torch.device) -> bool:
    """Let :func:`peak_bytes` begin anew from what is held now; false where the system offers no way.

    Main memory that was freed and not given back would hide what is taken anew, so it is given back first.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if not sys.platform.startswith("linux"):
        return False
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if malloc_trim is not None:
        malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that are free on a device; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return None
    available = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    limits = [*available, *_group_limit()]
    return min(limits, default=None)


def _group_limit() -> list[int]:
    """Return the bytes that the control group of a container leaves: one number, or none where nothing limits it."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = (group / "memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return []
    return [int(limit) - int(used)] if limit.isdecimal() else []


@dataclass(frozen=True, slots=True)
class Work:
    """How much a stage computes at the most, from which :mod:`kecore.forecast` tells how long it takes.

    Args:
        passes: passes through the layers; one with gradients counts as three.
        tokens: tokens of all passes together, counted likewise.
        layers: layers of each pass.
        logits: positions of all passes together whose logits are computed, counted likewise.
        operations: further multiplications and additions.
    """

    passes: int = 0
    tokens: int = 0
    layers: int = 0
    logits: int = 0
    operations: int = 0


@dataclass(frozen=True, slots=True)
class Need:
    """The memory that one stage takes.

    Args:
        stage: its name.
        parts: bytes that it holds whatever its micro-batches are, by what they are.
        token: bytes of each token of a micro-batch.
        tokens: how many it has in all, padding included.
        least: how many its smallest micro-batch has.
        mapped: which of the parts are memory-mapped from disk.
        work: how much it computes; None where that is not known beforehand.
    """

    stage: str
    parts: Mapping[str, int] = field(default_factory=dict)
    token: int = 0
    tokens: int = 0
    least: int = 0
    mapped: tuple[str, ...] = ()
    work: Work | None = None

    @property
    def fixed(self) -> int:
        """The bytes of all parts."""
        return sum(self.parts.values())

    def micro_batch(self, activations: int) -> int:
        """Return how many tokens run at a time where the stage may count so many bytes for their activations."""
        if not self.token:
            return 0
        return min(self.tokens, max(self.least, activations // self.token))

    def activations(self, room: int) -> int:
        """Return the bytes that the stage may count so that its micro-batches take no more than ``room``."""
        return room // self.token * self.token

    def bytes(self, activations: int) -> int:
        """Return the most bytes that the stage takes where it may count so many for a micro-batch."""
        return self.fixed + self.token * self.micro_batch(activations)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How stages that share one size of micro-batch keep within a budget.

    Args:
        budget: most bytes at one time; None where nothing limits them.
        held: bytes that are there already, by what they are.
        activations: bytes that stages may count for the activations of one micro-batch.
        needs: the stages.
    """

    budget: int | None
    held: Mapping[str, int]
    activations: int
    needs: tuple[Need, ...]

    def peak(self, need: Need) -> int:
        """Estimate the bytes of the process at the height of a stage."""
        return sum(self.held.values()) + need.bytes(self.activations)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "budget": self.budget,
            "held": dict(self.held),
            "activations": self.activations,
            "stages": [self._stage_json(need) for need in self.needs],
        }

    def _stage_json(self, need: Need) -> dict[str, Any]:
        return {
            "stage": need.stage,
            "parts": dict(need.parts),
            "mapped": list(need.mapped),
            "micro_batch_tokens": need.micro_batch(self.activations),
            "tokens": need.tokens,
            "peak_bytes": self.peak(need),
        }


def make_plan(
    view: ModelView, budget: int | None, needs: Sequence[Need], held: Mapping[str, int] | None = None
) -> MemoryPlan:
    """Size micro-batches so that every stage keeps within a budget.

    Args:
        view: the model, whose device counts.
        budget: most bytes at one time; None takes three quarters of what is free, and only warns if that is too little.
        needs: the stages.
        held: bytes that are held before the stages, by what they are, if they were measured earlier: memory that a
            process has given back to its allocator, which uses it again, does not count twice then.

    Raises:
        MemoryBudgetError: the model, or the smallest micro-batch of a stage, does not fit; names what is needed.
    """
    held = measure_held(view) if held is None else held
    base = sum(held.values())
    limit = budget
    if budget is None:
        free = free_bytes(view.device)
        limit = None if free is None else max(base, resident_bytes(view.device)) + int(_SHARE * free)
    largest = max(needs, key=lambda need: need.bytes(0), default=Need("edit"))
    least = base + largest.bytes(0)
    if budget is not None and least > budget:
        raise MemoryBudgetError(_explain_refusal(budget, held, largest, least))
    if limit is not None and least > limit:
        warnings.warn(
            f"stage '{largest.stage}' needs {_size(least)} at the least, {_size(least - base)} of them still to come; "
            "hardly so much is free on this machine",
            KecoreWarning,
            stacklevel=3,
        )
    activations = _ENOUGH if view.device.type == "cpu" or limit is None else limit
    if limit is not None:
        for need in needs:
            if need.token:
                room = int(_USABLE * (limit - base - need.fixed))
                activations = min(activations, need.activations(room))
    return MemoryPlan(limit, held, max(1, activations), tuple(needs))


def _explain_refusal(budget: int, held: Mapping[str, int], largest: Need, least: int) -> str:
    """Return why a budget is refused: what is held already, and what the largest stage needs at the least."""
    sizes = {**held, **largest.parts}
    if largest.token:
        smallest = largest.micro_batch(0)
        sizes[f"a micro-batch of {smallest:,} tokens"] = largest.token * smallest
    breakdown = ", ".join(f"{name} {_size(count)}" for name, count in sizes.items() if count)
    return (
        f"a memory budget of {_size(budget)} is too small: stage '{largest.stage}' needs {_size(least)} at the least "
        f"({breakdown}). Give it more, load the model in a smaller type, or edit fewer facts at once"
    )


def scoring_need(view: ModelView, tokens: int, stage: str = "score") -> Need:
    """Estimate what scoring continuations and writing answers takes, in micro-batches of at most ``tokens``."""
    token = forward_bytes(view) + cached_bytes(view, 0) + logits_bytes(view) // _TOKENS_PER_LOGITS
    return Need(stage, token=token, tokens=tokens, least=min(tokens, 64))


def _size(count: int) -> str:
    if count < 10 << 30:
        return f"{count / (1 << 20):,.0f} MiB"
    return f"{count / (1 << 30):,.1f} GiB"
