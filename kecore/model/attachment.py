"""Attachment: the one object that knows what kecore has put on a model.

It stands below the edits, which are opaque to it, so that reading a model's structure can put aside what acts beside
the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kecore.api.errors import EditStateError
from kecore.model.hooks import compiled, overlaid

__all__ = ["Attachment", "Installable"]


class Installable(Protocol):
    """An edit that acts beside a model through hooks."""

    @property
    def stands_for_weights(self) -> bool:
        """Whether it updates weights that cannot be written: it stays where only side modules are put aside."""
        ...

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Register the hooks and return their handles; leave no hook behind on failure."""
        ...


@dataclass(frozen=True, slots=True)
class _Written:
    """What was last written to a parameter, to notice that something else has written to it since."""

    data: Tensor
    version: int
    bit_sum: int

    @classmethod
    def read(cls, parameter: nn.Parameter) -> _Written:
        """Remember a parameter as it is: torch's own count of writes, which misses those to ``.data``, and its bits."""
        integer = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[parameter.element_size()]
        return cls(parameter.data, parameter._version, int(parameter.data.view(integer).sum(dtype=torch.int64)))

    def is_still_in(self, parameter: nn.Parameter) -> bool:
        """Return whether the parameter holds what was written; a move to another device or type is not a change."""
        if parameter.data_ptr() != self.data.data_ptr():
            return torch.equal(parameter.data, self.data.to(parameter.data))
        current = _Written.read(parameter)
        return (current.version, current.bit_sum) == (self.version, self.bit_sum)


@dataclass(eq=False)
class Attachment:
    """What is on one model now; get it with :meth:`of`.

    A copy of a model has an attachment of its own, and a model that is gone takes its attachment with it.

    Args:
        model_reference: the model, which the attachment does not keep alive.
        edits: the attached edits, in the order in which they were attached.
        unedited_data: parameter name to the data that the parameter had before any edit, of changed parameters only.
        prompts_suspended: prompt writers have no effect now.
    """

    model_reference: ref[nn.Module]
    edits: tuple[Any, ...] = ()
    unedited_data: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    prompts_suspended: bool = False
    _written: dict[str, _Written] = field(default_factory=dict[str, _Written])
    # Edits that act beside the model, in order; without handles while they are put aside.
    _handles: dict[Installable, list[RemovableHandle]] = field(default_factory=dict[Installable, list[RemovableHandle]])

    @classmethod
    def of(cls, model: nn.Module) -> Attachment:
        """Return the attachment of ``model``; every model has one, which is empty at first."""
        attachment = _ATTACHMENTS.get(model)
        if attachment is None:
            attachment = _ATTACHMENTS[model] = cls(ref(model))
        return attachment

    @property
    def model(self) -> nn.Module:
        """The model."""
        model = self.model_reference()
        if model is None:
            raise EditStateError("the model of this attachment is gone; keep the model as long as its edits are used")
        return model

    def base_data(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the unedited data of parameters, in the type and on the device that they have now.

        Args:
            names: names of parameters, whether an edit has changed them or not.
        """
        parameters = dict(self.model.named_parameters())
        return {name: self.unedited_data.get(name, parameters[name].data).to(parameters[name].data) for name in names}

    def check_weights(self) -> None:
        """Refuse to go on where a weight was changed by something else since kecore wrote it.

        Raises:
            EditStateError: names the weight.
        """
        parameters = dict(self.model.named_parameters())
        for name, written in self._written.items():
            if not written.is_still_in(parameters[name]):
                raise EditStateError(
                    f"{name} was changed by something else since the edit was attached; kecore will not overwrite "
                    "that change"
                )

    def write_weights(self, new_data: Mapping[str, Tensor]) -> None:
        """Let the parameters in ``new_data`` hold new data, and all others their unedited data.

        Args:
            new_data: parameter name to data of the parameter's shape, type and device.
        """
        parameters = dict(self.model.named_parameters())
        base = self.base_data(new_data)
        restored = self.base_data(name for name in self.unedited_data if name not in new_data)
        # Nothing can fail from here on: the model is never left half-edited.
        for name, data in (restored | dict(new_data)).items():
            parameters[name].data = data
        self.unedited_data = base
        self._written = {name: _Written.read(parameters[name]) for name in new_data}

    def set_beside(self, edits: Collection[Installable]) -> None:
        """Let these edits, and no others, act beside the model; all of them or, on failure, those of before."""
        # Installing may fail, removing may not, so the new ones come first.
        new = {edit: edit.install(self.model) for edit in edits if edit not in self._handles}
        for edit in [edit for edit in self._handles if edit not in edits]:
            remove_hooks(self._handles.pop(edit))
        self._handles.update(new)

    @contextmanager
    def unedited(self) -> Iterator[None]:
        """Put the weights of the unedited model in place inside the block."""
        parameters = dict(self.model.named_parameters())
        aside = [edit for edit, handles in self._handles.items() if handles and edit.stands_for_weights]
        with overlaid({parameters[name]: data for name, data in self.unedited_data.items()}), self._put_aside(aside):
            yield

    @contextmanager
    def without_prompts(self) -> Iterator[None]:
        """Let prompt writers have no effect inside the block; blocks nest."""
        was_suspended = self.prompts_suspended
        self.prompts_suspended = True
        try:
            yield
        finally:
            self.prompts_suspended = was_suspended

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Let nothing act beside the model inside the block, and no prompt writer; edited weights stay; blocks nest.

        Raises:
            EditStateError: something acts beside the model, and it was compiled since.
        """
        # A block around this one has put its own aside.
        aside = [edit for edit, handles in self._handles.items() if handles and not edit.stands_for_weights]
        with self._put_aside(aside), self.without_prompts():
            yield

    @contextmanager
    def _put_aside(self, edits: Collection[Installable]) -> Iterator[None]:
        """Take the hooks of edits off inside the block.

        Raises:
            EditStateError: there are some, and the model was compiled since.
        """
        if edits and compiled(self.model):  # found now, and not when they are to be put back
            raise EditStateError(
                f"{len(edits)} edit(s) act beside the model, which was compiled since, so they cannot be put aside "
                "for a while; make further edits before the model is compiled"
            )
        for edit in edits:
            remove_hooks(self._handles[edit])
            self._handles[edit] = []
        try:
            yield
        finally:
            for edit in edits:
                if edit in self._handles:  # it may have been taken off meanwhile
                    self._handles[edit] = edit.install(self.model)


def remove_hooks(handles: Iterable[RemovableHandle]) -> None:
    """Take hooks off again."""
    for handle in handles:
        handle.remove()


# Keyed by the model object itself and gone with it, so nothing leaks from one model to another.
_ATTACHMENTS: WeakKeyDictionary[nn.Module, Attachment] = WeakKeyDictionary()
