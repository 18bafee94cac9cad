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

__all__ = ["beside", "capture", "first_tensor", "frozen", "overlaid", "resumed", "stopped", "substitute"]


class _Stopped(Exception):
    """Raised inside a forward pass to end it early."""


def first_tensor(output: Any) -> Tensor:
    """The hidden state of a layer's output, which is a tensor or a tuple that begins with one."""
    return output if isinstance(output, Tensor) else output[0]


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state among a module's arguments: the first of them."""
    return args[0] if args else next(iter(kwargs.values()))


def compiled(model: nn.Module) -> bool:
    """Whether a model or a part of it is compiled, by ``torch.compile(module)`` or ``module.compile()``."""
    # torch has no public way to ask.
    return any(hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in model.modules())


def hooked(model: nn.Module) -> bool:
    """Whether something hangs on a module of the model, such as an edit that is no change of weights."""
    kinds = "_forward_hooks", "_forward_pre_hooks"  # torch has no public way to ask
    return any(getattr(module, kind) for module in model.modules() for kind in kinds)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no parameter asks for gradients, random state untouched; all restored on exit."""
    modes = [(m, m.training) for m in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters()]
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            model.eval()
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for module, mode in modes:
                module.training = mode


@contextmanager
def capture(modules: Sequence[nn.Module], *, inputs: bool = False) -> Iterator[list[Tensor]]:
    """Collect what each module returns (or, with ``inputs``, is given), in the order of ``modules``."""
    found: list[Any] = [None] * len(modules)

    def hook(place: int) -> Callable[..., None]:
        def keep(_m: nn.Module, args: Any, kwargs: Any, *output: Any) -> None:
            # A copy of outputs, because some architectures go on to write into them.
            found[place] = first_tensor(output[0]).detach().clone() if output else _first(args, kwargs).detach()

        return keep

    with ExitStack() as stack:
        for place, module in enumerate(modules):
            register = module.register_forward_pre_hook if inputs else module.register_forward_hook
            stack.callback(register(hook(place), with_kwargs=True).remove)
        yield found


@contextmanager
def substitute(module: nn.Module, change: Callable[[Tensor], Tensor], *, inputs: bool = False) -> Iterator[None]:
    """Pass a module's output (or, with ``inputs``, its first argument) through ``change``."""

    def before(_m: nn.Module, args: Any) -> Any:
        return (change(args[0]), *args[1:])

    def after(_m: nn.Module, _args: Any, output: Any) -> Any:
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

    def after(_m: nn.Module, args: Any, output: Tensor) -> Tensor:
        x = args[0]
        more = x.to(extra.dtype) @ extra.t() if isinstance(extra, Tensor) else extra(x)
        return output + more.to(output.dtype)

    handle = module.register_forward_hook(after)
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
        def forward(*args: Any, **kwargs: Any) -> Any:
            state = result if result is not None else _first(args, kwargs)
            return (state, *[None] * (items - 1)) if items else state

        return forward

    skipped = view.layers[:layer]
    # An accelerate hook also lives in the instance's `forward`, so what was there is put back.
    before = [(part.module, part.module.__dict__.get("forward")) for part in skipped]
    try:
        for part in skipped:
            part.module.__dict__["forward"] = skip(part.items, hidden if part.index == layer - 1 else None)
        yield
    finally:
        for module, forward in before:
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
    before = [(parameter, parameter.data) for parameter in parameters]
    try:
        for parameter, value in parameters.items():
            parameter.data = value
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
