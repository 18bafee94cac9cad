"""Edits that leave every weight alone: modules that act beside the model, and texts put before its prompts.

Both hold an :class:`Effect`, the part that a method brings: an object that can be told as JSON settings and
tensors, and made again from them. A file names the method, and the installed method's class says which
:class:`Effect` reads it, so that no code travels in an edit.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kecore.api.errors import ArtifactError, EditStateError, PluginError
from kecore.api.identity import Identity
from kecore.api.line import method_of
from kecore.edit.base import Edit, unedited
from kecore.files import explain_content_errors
from kecore.model.attachment import Attachment, remove_hooks
from kecore.model.hooks import compiled

if TYPE_CHECKING:
    from kecore.model import ModelView
    from kecore.text import Encoder

__all__ = [
    "Effect",
    "ModuleEdit",
    "PromptEdit",
    "PromptWriter",
    "Reader",
    "SideModule",
    "acting",
    "set_beside",
    "suspended",
    "written",
]


class Effect(ABC):
    """An effect is what an edit does while it is attached, and how that is kept in a file."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return everything but tensors, as JSON values."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors, by name."""

    @classmethod
    @abstractmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Effect:
        """Make the effect again from what :meth:`settings` and :meth:`tensors` returned."""


class SideModule(nn.Module, Effect):
    """A module that acts beside an unchanged model: GRACE's codebook, WISE's side memory, SERAC's scope classifier.

    A subclass is built from its settings alone, ``cls(**settings)``, with parameters or buffers of the right
    shapes, and hooks itself into a model. What is attached is a copy on the model's device, so that whatever it
    remembers while a text is written (under names that begin with an underscore) never enters the edit.
    """

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the arguments of the class, as JSON values."""

    @abstractmethod
    def install(self, model: nn.Module) -> Iterable[RemovableHandle]:
        """Register the hooks that let this module act on ``model``, and return all of their handles.

        A hook on ``model`` itself sees token ids, mask and cache; one on a submodule sees hidden states. Outputs keep
        the type that the model computes in.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Return the module's own parameters and buffers."""
        return dict(self.state_dict())

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SideModule:
        """Build the module and fill it."""
        shapes = _built_shapes(cls, settings)
        given = {name: tensor.shape for name, tensor in tensors.items()}
        if shapes is not None and shapes != given:
            raise ValueError(f"the settings of {cls.__name__} and the file's tensors are of different sizes")
        module = cls(**settings)
        module.load_state_dict(dict(tensors))
        return module

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Let the module itself, not a copy, act on ``model`` inside the block: for methods that train it."""
        handles = list(self.install(model))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _built_shapes(kind: type[SideModule], settings: Mapping[str, Any]) -> dict[str, torch.Size] | None:
    """Return the shapes of the tensors that a module of these settings has, without memory for them.

    A file may ask for any size: it gets no more than the tensors take that it brings.

    Returns:
        The shapes by name; None for a class that cannot be built without data.
    """
    try:
        with torch.device("meta"):
            return {name: tensor.shape for name, tensor in kind(**settings).state_dict().items()}
    except (NotImplementedError, RuntimeError):
        return None


@dataclass(frozen=True, slots=True)
class Reader:
    """The model that reads what a prompt writer writes.

    Args:
        view: the model.
        encoder: its tokenizer and prompt form.
    """

    view: ModelView
    encoder: Encoder


class PromptWriter(Effect):
    """A prompt writer puts something before a user's prompt: a fact, demonstrations, whatever was retrieved for it."""

    @abstractmethod
    def write(self, prompts: Sequence[str]) -> list[str]:
        """Return what the model reads instead of each prompt; a prompt out of the edit's scope comes back as it is."""

    def to(self, reader: Reader) -> PromptWriter:
        """Return the writer for one reader.

        A writer that asks the model itself returns a copy that knows the reader; others return themselves.
        What such a writer asks is not written by any edit, itself included; edited weights and side modules act.
        """
        del reader
        return self


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class EffectEdit(Edit):
    """An edit with an effect.

    Args:
        effect: what acts while the edit is attached.
        supersedes: the edit holds all that earlier edits of its method on the same model hold, and stands in their
            place while it is attached.
    """

    effect: Effect
    supersedes: bool = False

    effects: ClassVar[type[Effect]] = Effect
    """What kind of effect such an edit has."""

    def __post_init__(self) -> None:
        if not isinstance(self.effect, self.effects):  # a third party's mistake, which no file should be made of
            raise PluginError(
                f"{type(self).__name__} needs a {self.effects.__name__}, and method '{self.method}' gave a "
                f"{type(self.effect).__name__}"
            )

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"effect/{name}": tensor for name, tensor in self.effect.tensors().items()}
        return tensors, {"effect": self.effect.settings(), "supersedes": self.supersedes}

    @classmethod
    def load(cls: type[EE], path: str | Path, method: type[Any] | None = None) -> EE:
        """Read an edit.

        Args:
            path: a file, or a folder that holds ``edit.safetensors``.
            method: the class that made it; by default the installed method of that name.

        Raises:
            ArtifactError: missing, truncated, corrupt, foreign, or from a newer kecore.
            MethodNotFoundError: the method that made it is not installed.
        """
        with explain_content_errors(path, "edit"):
            return cls._load(path, method)

    @classmethod
    def _load(cls: type[EE], path: str | Path, method: type[Any] | None) -> EE:
        common, header, tensors = cls._read(path)
        maker = method or method_of(common["method"])
        kind: type[Effect] | None = getattr(maker, "effect", None)
        if kind is None or not issubclass(kind, cls.effects):
            raise ArtifactError(
                f"{path}: method '{common['method']}' does not say how to read its edits (no {cls.effects.__name__} "
                "under `effect`); install the version that made the file"
            )
        effect_tensors = {name.removeprefix("effect/"): tensor for name, tensor in tensors.items()}
        effect = kind.restore(header["effect"], effect_tensors)
        return cls(effect=effect, supersedes=header["supersedes"], **common)

    def inspect(self) -> dict[str, Any]:
        """Return method, requests, settings and tensors, as JSON values."""
        tensors = self.effect.tensors()
        return {
            **super().inspect(),
            "effect": type(self.effect).__name__,
            "settings": self.effect.settings(),
            "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
            "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        }


EE = TypeVar("EE", bound=EffectEdit)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ModuleEdit(EffectEdit):
    """A :class:`SideModule` beside an unchanged model."""

    effect: SideModule

    kind: ClassVar[str] = "module-edit"
    effects: ClassVar[type[Effect]] = SideModule

    stands_for_weights: ClassVar[bool] = False

    def acts_beside(self, model: nn.Module) -> bool:
        """Return True: all of it does."""
        del model
        return True

    def _set(self, model: nn.Module, edits: Sequence[Edit]) -> None:
        set_beside(model, edits)

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Let a copy of the side module act on ``model``, and return the handles of its hooks.

        Users call :meth:`attach`, which keeps the handles and checks the model.

        Raises:
            EditStateError: the model is compiled.
        """
        if compiled(model):
            raise EditStateError(
                "the model is compiled, and compiled code may pass over what acts beside it; attach the edit first, "
                "and compile the model after that"
            )
        side = copy.deepcopy(self.effect)
        side = side.to(next(model.parameters()).device).eval().requires_grad_(False)
        handles: list[RemovableHandle] = []
        try:
            for handle in side.install(model):
                handles.append(handle)
        except BaseException:
            remove_hooks(handles)
            raise
        return handles


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class PromptEdit(EffectEdit):
    """A :class:`PromptWriter` before an unchanged model.

    Everything in kecore that asks an edited model (scores, generations, the command line) sends prompts through
    :func:`written` first. Whoever runs the model alone does the same. Any model can carry such an edit.
    """

    effect: PromptWriter

    kind: ClassVar[str] = "prompt-edit"
    effects: ClassVar[type[Effect]] = PromptWriter

    def check_base(self, model: nn.Module, base: Identity | None = None) -> None:
        """Texts fit every model."""

    def _set(self, model: nn.Module, edits: Sequence[Edit]) -> None:
        """Do nothing: the attachment's list of edits is all that there is."""


def written(model: nn.Module, prompts: Sequence[str], reader: Reader | None = None) -> list[str]:
    """Return what ``model`` is to read for these prompts, with the prompt edits that are attached to it.

    Args:
        model: the model.
        prompts: what a user asks.
        reader: the model's structure and tokenizer, for edits that ask the model itself.

    Raises:
        EditStateError: an attached edit asks the model itself, and no ``reader`` is given.
    """
    attachment = Attachment.of(model)
    if attachment.prompts_suspended:
        return list(prompts)
    unique_prompts = list(dict.fromkeys(prompts))
    texts = unique_prompts
    edits = [edit for edit in acting(attachment.edits) if isinstance(edit, PromptEdit)]
    with attachment.without_prompts():  # what a writer asks goes to the model as it is
        for edit in edits:
            writer = edit.effect if reader is None else edit.effect.to(reader)
            texts = writer.write(texts)
    text_of_prompt = dict(zip(unique_prompts, texts, strict=True))
    return [text_of_prompt[prompt] for prompt in prompts]


def set_beside(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Let those of ``edits`` act beside the model that do so, and no others; all of them or, on failure, as before."""
    beside: list[Any] = [edit for edit in acting(edits) if edit.acts_beside(model)]
    Attachment.of(model).set_beside(beside)


def suspended(model: nn.Module) -> AbstractContextManager[None]:
    """Let side modules and prompt writers have no effect inside the block; edited weights stay.

    Raises:
        EditStateError: side modules act on the model, and it was compiled since.
    """
    return Attachment.of(model).suspended()


@contextmanager
def without_edits(model: nn.Module) -> Iterator[None]:
    """Let the model be what it was before its edits inside the block: the base's weights, and nothing beside them."""
    with suspended(model), unedited(model):
        yield


def acting(edits: Iterable[Edit]) -> list[Edit]:
    """Return the edits that act: all but those that a later one of the same method supersedes.

    Args:
        edits: in the order in which they were attached.
    """
    acting_edits: list[Edit] = []
    for edit in edits:
        if isinstance(edit, EffectEdit) and edit.supersedes:
            acting_edits = [earlier for earlier in acting_edits if earlier.method != edit.method]
        acting_edits.append(edit)
    return acting_edits
