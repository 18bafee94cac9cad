"""Running a model in pieces: the only place that hooks, bypasses or stops a forward pass.

Everything is restored when a pass ends, also when it fails. The model's own ``forward`` is always what
runs, so masks, position embeddings, caches and logit scaling are the architecture's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from kecore.model.view import ModelView

__all__ = [
    "beside",
    "capture",
    "capture_argument",
    "first_argument",
    "first_tensor",
    "frozen",
    "overlaid",
    "resumed",
    "stopped",
    "substitute",
]


class _Stopped(Exception):
    """Raised inside a forward pass to end it early."""


def first_tensor(output: Any) -> Tensor:
    """Return the hidden state in a layer's output, which is a tensor or a tuple that begins with one."""
    return output if isinstance(output, Tensor) else output[0]


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the first of a module's arguments, which is the hidden state."""
    return args[0] if args else next(iter(kwargs.values()))


def compiled(model: nn.Module) -> bool:
    """Return whether a model or a part of it is compiled, by ``torch.compile(module)`` or ``module.compile()``."""
    # torch has no public way to ask.
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) for module in model.modules()
    )


def hooked(model: nn.Module) -> bool:
    """Return whether something hangs on a module of the model, such as an edit that is no change of weights."""
    for kind in ("_forward_hooks", "_forward_pre_hooks"):  # torch has no public way to ask
        if any(getattr(module, kind) for module in model.modules()):
            return True
    return False


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let a model be in evaluation mode, without gradients of its weights, inside a block; all is restored on exit.

    The state of the random generators is restored too.
    """
    was_training = [(module, module.training) for module in model.modules()]
    required_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = {parameter.device for parameter in model.parameters()}
    gpus = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    with torch.random.fork_rng(devices=gpus):
        try:
            model.eval()
            for parameter, _ in required_grad:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in required_grad:
                parameter.requires_grad_(flag)
            for module, flag in was_training:
                module.training = flag


@contextmanager
def capture(modules: Sequence[nn.Module], *, inputs: bool = False) -> Iterator[list[Tensor]]:
    """Collect what each module returns (or, with ``inputs``, is given), in the order of ``modules``."""
    tensors: list[Any] = [None] * len(modules)  # None where a module has not run

    def keep_input(index: int) -> Callable[..., None]:
        def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors[index] = first_argument(args, kwargs).detach()

        return keep

    def keep_output(index: int) -> Callable[..., None]:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            # A copy, because some architectures go on to write into their outputs.
            tensors[index] = first_tensor(output).detach().clone()

        return keep

    with ExitStack() as stack:
        for index, module in enumerate(modules):
            if inputs:
                handle = module.register_forward_pre_hook(keep_input(index), with_kwargs=True)
            else:
                handle = module.register_forward_hook(keep_output(index))
            stack.callback(handle.remove)
        yield tensors


@contextmanager
def capture_argument(module: nn.Module, position: int | str) -> Iterator[list[Tensor]]:
    """Collect the last value of one argument of a module, in a list of one.

    Args:
        module: the module.
        position: where the argument stands in the call, or its name where it is passed by name.
    """
    tensors: list[Any] = [None]

    def keep(_module: nn.Module, args: Any, kwargs: Any) -> None:
        argument = args[position] if isinstance(position, int) else kwargs[position]
        tensors[0] = argument.detach()

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield tensors
    finally:
        handle.remove()


@contextmanager
def substitute(module: nn.Module, change: Callable[[Tensor], Tensor], *, inputs: bool = False) -> Iterator[None]:
    """Pass a module's output (or, with ``inputs``, its first argument) through ``change``."""

    def before(_module: nn.Module, args: Any) -> Any:
        return (change(args[0]), *args[1:])

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        new = change(first_tensor(output))
        return new if isinstance(output, Tensor) else (new, *output[1:])

    handle = module.register_forward_pre_hook(before) if inputs else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def beside(module: nn.Module, extra: Tensor | Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let ``module`` return ``output + extra(input)``, where a matrix ``[d_out, d_in]`` stands for its product."""

    def after(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        x, value = first_argument(args, kwargs), first_tensor(output)
        addend = x.to(extra.dtype) @ extra.t() if isinstance(extra, Tensor) else extra(x)  # [..., d_out]
        new = value + addend.to(value.dtype).reshape(value.shape)
        return new if isinstance(output, Tensor) else (new, *output[1:])

    handle = module.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def resumed(view: ModelView, layer: int, hidden: Tensor) -> Iterator[None]:
    """Feed ``hidden`` ``[rows, width, d_model]`` to ``layer`` and skip the layers below it.

    The skipped layers are bypassed, not removed: some architectures read their attributes.
    """
    if not view.skips:
        with substitute(view.layers[layer - 1].module, lambda _: hidden):
            yield
        return

    def skip(items: int, result: Tensor | None) -> Callable[..., Any]:
        """Return a ``forward`` that hands on a result, or without one what it was given, in a tuple of ``items``."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            state = result if result is not None else first_argument(args, kwargs)
            if not items:
                return state
            return (state, *[None] * (items - 1))

        return forward

    skipped = view.layers[:layer]
    # An accelerate hook also lives in the instance's `forward`, so what was there is put back.
    own_forwards = [(skipped_layer.module, skipped_layer.module.__dict__.get("forward")) for skipped_layer in skipped]
    try:
        for skipped_layer in skipped:
            result = hidden if skipped_layer.index == layer - 1 else None
            skipped_layer.module.__dict__["forward"] = skip(skipped_layer.items, result)
        yield
    finally:
        for module, forward in own_forwards:
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


@contextmanager
def stopped(module: nn.Module, *, inputs: bool = False) -> Iterator[None]:
    """End the forward pass inside this block as soon as ``module`` has run (or, with ``inputs``, is about to)."""

    def stop(*_: Any) -> None:
        raise _Stopped

    handle = module.register_forward_pre_hook(stop) if inputs else module.register_forward_hook(stop)
    try:
        yield
    except _Stopped:
        pass
    finally:
        handle.remove()


@contextmanager
def overlaid(parameters: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Let parameters hold other values; their own storage is put back on exit, bit for bit."""
    own_data = [(parameter, parameter.data) for parameter in parameters]
    try:
        for parameter, value in parameters.items():
            parameter.data = value
        yield
    finally:
        for parameter, data in own_data:
            parameter.data = data
