"""Every error kecore raises on purpose: one tree, each class with one cause and one way out.

Each class also inherits the builtin that Python code would expect in its place, so ``except ValueError``
keeps working. Messages say what was expected, what came, and what to do next.
``docs/errors/<class>.md`` explains each class, and ``kecore explain <class>`` prints it.
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "ArtifactMismatchError",
    "ConfigError",
    "DataFormatError",
    "EditStateError",
    "HubError",
    "IncompatiblePluginError",
    "JudgeError",
    "KecoreError",
    "KecoreWarning",
    "LayerError",
    "MemoryBudgetError",
    "MethodNotFoundError",
    "MissingDependencyError",
    "ModelLoadError",
    "NativeError",
    "NonFiniteError",
    "NumericalError",
    "OperandError",
    "PluginError",
    "PromptTooLongError",
    "ProtocolMismatchError",
    "RequestConflictError",
    "RequestError",
    "StatisticsMismatchError",
    "StorageError",
    "StoreInUseError",
    "TokenizerError",
    "UnsupportedCapabilityError",
    "UnsupportedModelError",
    "WorkerError",
]


class KecoreError(Exception):
    """Base of every error that kecore raises on purpose."""


class KecoreWarning(UserWarning):
    """Base of every warning that kecore issues."""


class RequestError(KecoreError, ValueError):
    """An edit request is malformed: no subject in the prompt, an empty target, and the like."""


class RequestConflictError(RequestError):
    """Two requests of one batch ask the same prompt for different targets."""


class PromptTooLongError(RequestError):
    """A prompt with its contexts and target does not fit the model's context window."""


class ConfigError(KecoreError, ValueError):
    """A method's configuration has an unknown key or a value outside its bounds."""


class ProtocolMismatchError(ConfigError):
    """Results of two protocols were to stand in one table or one store (names what differs)."""


class LayerError(KecoreError, IndexError):
    """A layer was asked for that the model does not have."""


class DataFormatError(KecoreError, ValueError):
    """A facts file cannot be read: unknown layout, a bad line, a missing field."""


class HubError(KecoreError, OSError):
    """The Hugging Face hub cannot be reached, refuses, or has no such repository, file or split."""


class ModelLoadError(KecoreError, OSError):
    """A model reference leads nowhere or to something that is not a causal language model."""


class UnsupportedModelError(KecoreError, TypeError):
    """A model's structure cannot be read well enough to edit it (names what was found)."""


class TokenizerError(KecoreError, TypeError):
    """A tokenizer lacks what editing needs: offsets of tokens in the text, or a chat template."""


class UnsupportedCapabilityError(KecoreError, TypeError):
    """A method was asked for something its capabilities exclude."""


class StatisticsMismatchError(KecoreError, ValueError):
    """Key statistics belong to another model, layer or text than the one asked for."""


class ArtifactError(KecoreError, ValueError):
    """A file is not a kecore artifact, or it is truncated or corrupt."""


class ArtifactMismatchError(ArtifactError):
    """An edit or a trained editor was made for another base model than the one it is to be used with."""


class StorageError(KecoreError, OSError):
    """A file cannot be written: the disk is full, or the place is not writable; nothing was left half-written."""


class StoreInUseError(KecoreError, RuntimeError):
    """Another run is writing to the store of results."""


class WorkerError(KecoreError, RuntimeError):
    """A process of several that share a run ended badly, or could not begin."""


class EditStateError(KecoreError, RuntimeError):
    """An edit is attached twice, or taken off a model it is not attached to."""


class MemoryBudgetError(KecoreError, MemoryError):
    """A memory budget cannot hold the model, or the smallest micro-batch of an edit (names what is needed)."""


class NumericalError(KecoreError, ArithmeticError):
    """A linear system cannot be solved to a useful accuracy (says which ridge would help)."""


class NonFiniteError(NumericalError):
    """Weights, keys, values or an update hold NaN or infinity; nothing was attached."""


class OperandError(KecoreError, ValueError):
    """A tensor given to a native operation has the wrong shape, type, device or strides, or shares memory."""


class NativeError(KecoreError, RuntimeError):
    """``KECORE_NATIVE`` asks for native code that cannot be had here (says what is missing)."""


class JudgeError(KecoreError, RuntimeError):
    """A judge of free text cannot be asked: it has no credentials, or its server does not answer."""


class PluginError(KecoreError, ImportError):
    """A plugin could not be loaded or does not fulfil the method contract."""


class IncompatiblePluginError(PluginError):
    """A plugin was written for another version of the method interface."""


class MethodNotFoundError(KecoreError, KeyError):
    """No method of that name is installed."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument; an error message is prose.
        return str(self.args[0]) if self.args else ""


class MissingDependencyError(KecoreError, ImportError):
    """An optional dependency is not installed (names the extra that brings it)."""
