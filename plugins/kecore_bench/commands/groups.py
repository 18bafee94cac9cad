"""Options that ``kecore eval``, ``bench`` and ``compare`` have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from kecore.cli import options
from kecore_bench.commands import options as bench_options

__all__ = ["MethodOptions", "RunOptions"]


@dataclass(frozen=True)
class MethodOptions:
    """Options that name the baselines, and what methods are given beside the facts."""

    without: bench_options.Without = None
    stats: options.Stats = None
    text: options.Texts = None
    tokens: options.Tokens = None
    trained: bench_options.TrainedEditors = None
    examples: options.Examples = None

    def fields(self) -> dict[str, Any]:
        """Return the fields of a plan."""
        return {
            "without": options.names(self.without),
            "stats": self.stats,
            "text": self.text,
            "tokens": self.tokens,
            "trained": self.trained,
            "examples": self.examples,
        }


@dataclass(frozen=True)
class RunOptions:
    """Options that say how scores are taken, and on which device.

    Device and type have no value of their own, so that those of a plan's file stand where none is given.
    """

    protocol: bench_options.ProtocolFields = None
    references: bench_options.References = None
    jobs: bench_options.Jobs = 1
    device: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps, ...", show_default="auto")
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="auto (as stored), float32, bfloat16 or float16.", show_default="auto"),
    ] = None
    memory: options.Memory = "auto"
    trust_remote_code: options.RemoteCode = False
    track: bench_options.Track = None

    def fields(self) -> dict[str, Any]:
        """Return the fields of a plan, without those of its protocol."""
        return {
            "references": self.references,
            "device": self.device,
            "dtype": self.dtype,
            "memory": options.byte_count(self.memory),
            "trust_remote_code": self.trust_remote_code or None,
        }
