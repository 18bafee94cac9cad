"""Records everything about a model and the process that a function which only reads must leave as it was."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

__all__ = ["Snapshot"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Snapshot:
    """A model's tensors, gradients, flags, modes and hooks, and the random states, as they are now.

    Args:
        model: the model; its tensors are copied.

    Examples:
        >>> from torch import nn
        >>> model = nn.Linear(2, 2)
        >>> before = Snapshot(model)
        >>> _ = model.eval()
        >>> before.differences()
        ['mode of module (top)']
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._state = self._read(copy=True)

    def differences(self) -> list[str]:
        """Return what is not bitwise as it was, in words; empty if everything is."""
        now = self._read(copy=False)
        names = dict.fromkeys([*self._state, *now])  # each once, in order
        return [name for name in names if not _same(self._state.get(name), now.get(name))]

    def _read(self, *, copy: bool) -> dict[str, Any]:
        state: dict[str, Any] = {
            "random state of torch": torch.get_rng_state(),
            "random state of python": random.getstate(),
            "random state of numpy": repr(np.random.get_state()),
            "number of threads": torch.get_num_threads(),
            "gradients enabled": torch.is_grad_enabled(),
            "default dtype": torch.get_default_dtype(),
        }
        for name, parameter in self.model.named_parameters():
            state[f"parameter {name}"] = parameter.detach().clone() if copy else parameter.detach()
            state[f"identity of {name}"] = (id(parameter), parameter.data_ptr())
            state[f"requires_grad of {name}"] = parameter.requires_grad
            state[f"gradient of {name}"] = None if parameter.grad is None else parameter.grad.detach().clone()
        for name, buffer in self.model.named_buffers():
            state[f"buffer {name}"] = buffer.clone() if copy else buffer
        for name, module in self.model.named_modules():
            name = name or "(top)"
            state[f"mode of module {name}"] = module.training
            state[f"hooks of module {name}"] = [list(getattr(module, hooks)) for hooks in _HOOKS]
            state[f"forward of module {name}"] = module.__dict__.get("forward")
            state[f"attributes of module {name}"] = sorted(module.__dict__)
        return state


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        # As bytes, so that NaN equals itself and 0.0 differs from -0.0.
        same = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return same and torch.equal(_bytes(a), _bytes(b))
    return type(a) is type(b) and bool(a == b)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
