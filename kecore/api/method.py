"""The contract between kecore and an editing method, built-in or third-party.

A method is a class with five attributes and one function. It never changes the model: it returns an
:class:`~kecore.edit.Edit`, and only the edit touches weights. ``docs/write-a-method.md`` builds one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from kecore.api.progress import Progress, Stages, silent
from kecore.api.requirements import missing_examples, missing_statistics, missing_training
from kecore.api.types import Capabilities, EditRecord

if TYPE_CHECKING:
    from torch import Tensor

    from kecore.api.config import MethodConfig
    from kecore.api.identity import Fingerprint
    from kecore.batch import RequestBatch
    from kecore.edit import Edit
    from kecore.model import ModelView
    from kecore.statistics import KeyStatistics
    from kecore.text import Encoder
    from kecore.trained import TrainedEditor

__all__ = ["METHOD_API", "EditMethod", "MethodContext"]

METHOD_API = 2
"""Version of this contract. It rises when a method written for the old one may break.

Since 2, ``plan`` and ``needs`` receive a :class:`~kecore.batch.RequestBatch` instead of a list of requests.
"""


@dataclass(slots=True)
class MethodContext:
    """What a method is given beside the model and the requests; no method reads globals.

    Args:
        config: the validated configuration, an instance of the method's ``Config``.
        encoder: text to token rows, with or without chat template.
        seed: seeds everything random in the method.
        statistics: key statistics of the unedited model; None where none are at hand.
        trained: what the method's training left; None where nothing is at hand.
        examples: records that demonstrations may be taken from; none of them is to be written.
        earlier: edits of this method that act on the model now, oldest first; a further edit may take over what they
            hold (``supersedes``).
        base: fingerprint of the unedited model; None to take it from the model as it is.
        state: tensors that survive from one edit of this method to the next on the same model. A method
            reads it and writes what the next edit needs; kept only if the edit is attached.
        memo: what holds for the unedited model and may be reused by later edits of the session, such as
            sampled contexts; keyed by everything it depends on. What asks the model is worked out inside
            :func:`kecore.edit.without_edits`, since it may be asked for first when edits are on it already.
        progress: called while long stages advance.
        stages: where a method counts its time.
        memory: bytes that activations of one micro-batch may take.
    """

    config: Any
    encoder: Encoder
    seed: int = 0
    statistics: KeyStatistics | None = None
    trained: TrainedEditor | None = None
    examples: Sequence[EditRecord] = ()
    earlier: Sequence[Edit] = ()
    base: Fingerprint | None = None
    state: dict[str, Tensor] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)
    progress: Progress = silent
    stages: Stages = field(default_factory=Stages)
    memory: int = 2 << 30

    def need_statistics(self, layers: Iterable[int], method: str = "") -> KeyStatistics:
        """Return the key statistics, which cover these layers; call it before anything that takes long.

        Args:
            layers: what they have to cover.
            method: the method's name, for the message.

        Raises:
            UnsupportedCapabilityError: no statistics are at hand.
            StatisticsMismatchError: they do not cover a layer.
        """
        if self.statistics is None:
            raise missing_statistics(method)
        for layer in layers:
            self.statistics.need(layer)
        return self.statistics

    def need_trained(self, view: ModelView, method: str) -> Mapping[str, Tensor]:
        """Return the trained tensors, which belong to this method and model; call it before anything that takes long.

        Raises:
            UnsupportedCapabilityError: none are at hand.
            ArtifactMismatchError: they belong to another method or model; names what differs.
        """
        if self.trained is None:
            raise missing_training(method)
        self.trained.check(view, method, self.fingerprint(view))
        return self.trained.tensors

    def need_examples(self, method: str) -> Sequence[EditRecord]:
        """Return the records that demonstrations are taken from.

        Raises:
            UnsupportedCapabilityError: none were given.
        """
        if not self.examples:
            raise missing_examples(method)
        return self.examples

    def fingerprint(self, view: ModelView) -> Fingerprint:
        """Return the fingerprint of the unedited model, which the edit will belong to."""
        from kecore.api.identity import Fingerprint  # with torch, which finding plugins takes no part of

        return self.base or Fingerprint.of(view.identity(), view.dtype)


@runtime_checkable
class EditMethod(Protocol):
    """An editing method.

    Attributes:
        name: the name users type; equals the entry-point name.
        Config: a :class:`MethodConfig` whose defaults run on any model.
        capabilities: what the method can do and needs.
        reference: the paper, as ``"Authors, Title, venue year, arXiv:..."``.
        api: lowest and highest :data:`METHOD_API` that the method is written for.

    A method that trains also has what :class:`kecore.training.Trainable` asks for: a ``schedule``, and
    ``prepare(view, records, context)``, which returns a :class:`~kecore.training.Learner`. Its ``plan`` takes what the
    training left from :meth:`MethodContext.need_trained`.
    """

    name: ClassVar[str]
    Config: ClassVar[type[MethodConfig]]
    capabilities: ClassVar[Capabilities]
    reference: ClassVar[str]
    api: ClassVar[tuple[int, int]]

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> Edit:
        """Work out the edit for the batch's requests; the model is bitwise as before when this returns."""
        ...
