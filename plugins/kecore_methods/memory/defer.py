"""DEFER: one gate and one side network beside a feed-forward block, tuned further on every edit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kecore.api.errors import ConfigError
from kecore.api.method import MethodContext
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import ModuleEdit, SideModule, suspended
from kecore.engine.passes import Passes, hook_projection
from kecore.engine.side import side_edit
from kecore.engine.tuning import Targets, batch_need, choose_layer, train
from kecore.memory import Need
from kecore.model import ModelView
from kecore.model.sites import Key
from kecore.text import Encoded
from kecore_methods import hparams
from kecore_methods.hparams import HparamsTable
from kecore_methods.presets import Published

__all__ = ["Defer", "DeferConfig", "SideNetwork"]

_TENSORS = ("gate", "bias", "side", "shift")


class DeferConfig(Published):
    """Configuration of DEFER; EasyEdit's numbers are for Llama-2-7B. docs/methods/defer.md gives the reasons."""

    hparams_table: ClassVar[HparamsTable | None] = hparams.DEFER

    layer: int | None = Field(
        default=None, ge=0, description="Layer with the side network; None goes by depth (kecore's choice)."
    )
    depth: float = Field(
        default=0.87,
        ge=0,
        le=1,
        description="Depth of that layer (kecore's choice: GRACE's, which DEFER is compared with).",
    )
    threshold: float = Field(
        default=0.5, gt=0, lt=1, description="A token is deferred from this output of the gate on (EasyEdit: 0.5)."
    )
    closed: float = Field(
        default=2.0,
        description="How far the gate's logit is below 0 for every token before the first edit (kecore's choice; the "
        "released gate begins near 0).",
    )
    steps: int = Field(default=100, ge=1, description="Gradient steps of an edit, at the most (EasyEdit: 100).")
    relative_learning_rate: float = Field(
        default=0.1,
        gt=0,
        description="Of Adam for the side network, relative to the matrix's root mean square (kecore's choice: "
        "WISE's).",
    )
    gate_learning_rate: float = Field(
        default=0.3,
        gt=0,
        description="Of Adam for the gate: how far one step moves its logit, at the most (kecore's choice).",
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Of Adam for both as a number (0.1 in the released code, 7e-5 in EasyEdit); None: the relative "
        "ones, which suit any model (kecore's choice).",
    )
    stop_loss: float = Field(
        default=5e-2, ge=0, description="An edit is finished at a loss below this (kecore's choice)."
    )

    def edited_layer(self, view: ModelView) -> int:
        """Return the layer with the side network, chosen by depth unless given."""
        return choose_layer(view, self.layer, self.depth)

    def needs(self, view: ModelView, batch: RequestBatch) -> list[Need]:
        """Return the memory of one request at a time, and of the side network with gradient and moments."""
        layer = self.edited_layer(view)
        projection = view.layers[layer].block
        size = 4 * 5 * projection.d_out * projection.d_in
        return [batch_need(view, batch.encodings, 1, layer, {"side network and moments": size}, epochs=self.steps)]


class SideNetwork(SideModule):
    """A gate on the input of a value projection, and a linear network whose output stands in where it is open.

    Every token is decided for itself, so the answer is the same in a padded batch, under teacher forcing and with a
    cache. Where the gate is closed, the projection's output is the model's own, bit for bit.

    Args:
        place: module path of the value projection.
        d_in: width of its input.
        d_out: width of its output.
        threshold: of the gate.
    """

    gate: Tensor
    bias: Tensor
    side: Tensor
    shift: Tensor

    def __init__(self, place: str, d_in: int, d_out: int, threshold: float) -> None:
        super().__init__()
        self.place, self.threshold = place, threshold
        self._soft = False
        self.register_buffer("gate", torch.zeros(d_in))
        self.register_buffer("bias", torch.zeros(()))
        self.register_buffer("side", torch.zeros(d_out, d_in))
        self.register_buffer("shift", torch.zeros(d_out))

    def settings(self) -> dict[str, Any]:
        """Return the arguments of the class."""
        d_out, d_in = self.side.shape
        return {"place": self.place, "d_in": d_in, "d_out": d_out, "threshold": self.threshold}

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Act on the output of the value projection."""
        return hook_projection(model, self.place, self._act)

    @contextmanager
    def mixing(self) -> Iterator[None]:
        """Mix both outputs by the gate inside the block, so that the gate has a gradient."""
        self._soft = True
        try:
            yield
        finally:
            self._soft = False

    def logit(self, keys: Tensor) -> Tensor:
        """Return the gate before its sigmoid, ``[...]``: a linear map of keys ``[..., d_in]`` at a size of 1."""
        # Keys of one model differ in length by orders of magnitude; without it one rate would not suit all tokens.
        size = keys.square().mean(-1, keepdim=True).sqrt().clamp(min=torch.finfo(keys.dtype).tiny)
        return (keys / size) @ self.gate.to(keys) + self.bias.to(keys)

    def _act(self, keys: Tensor, out: Tensor, mask: Tensor, _passes: Passes) -> Tensor:
        gate = (torch.sigmoid(self.logit(keys)) * mask).unsqueeze(-1)  # [rows, width, 1], closed on padding
        layer_value = out.float()
        side_value = layer_value + keys @ self.side.to(keys).t() + self.shift.to(keys)  # [rows, width, d_out]
        if self._soft:
            return (gate * side_value + (1 - gate) * layer_value).to(out.dtype)
        return torch.where(gate >= self.threshold, side_value.to(out.dtype), out)


class Defer:
    """Let a side network speak where a gate defers to it, and tune both on every edit in turn."""

    name = "defer"
    Config = DeferConfig
    capabilities = Capabilities(kind="modules", sequential=True, needs_subject=False, variant="own gate")
    reference = (
        "A baseline of Hartvigsen et al., Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors, "
        "NeurIPS 2023, arXiv:2211.11031"
    )
    api = (2, 2)
    effect = SideNetwork

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> ModuleEdit:
        """Tune gate and side network on the requests one after another; the model is as before when this returns."""
        config: DeferConfig = context.config
        items = batch.encodings
        layer = config.edited_layer(view)
        network = _open_network(view, layer, config, context.state).to(view.device)
        losses: list[float] = []
        shares: list[float] = []
        with view.frozen(), suspended(view.model), network.on(view.model), context.stages("tune"):
            for item in items:
                loss, share = _tune(view, context, layer, network, item)
                losses.append(loss)
                shares.append(share)
        network.cpu()
        context.state.update({"layer": torch.tensor(layer), **network.tensors()})
        notes = {"layers": [layer], "loss": losses, "deferred": shares}
        return side_edit(network, view, context, self.name, batch.requests, notes)


def _open_network(view: ModelView, layer: int, config: DeferConfig, state: Mapping[str, Tensor]) -> SideNetwork:
    """Return the network that earlier edits left, or a closed gate and a network that says what the layer says.

    Raises:
        ConfigError: earlier edits are at another layer.
    """
    projection = view.layers[layer].block
    path = projection.name
    network = SideNetwork(path, projection.d_in, projection.d_out, config.threshold)
    if not state:
        network.bias.fill_(-config.closed)
        return network
    if int(state["layer"]) != layer:
        raise ConfigError(
            f"the side network of this session is at layer {int(state['layer'])}, not {layer}; revert its edits first"
        )
    network.load_state_dict({name: state[name] for name in _TENSORS})
    return network


def _tune(
    view: ModelView, context: MethodContext, layer: int, network: SideNetwork, item: Encoded
) -> tuple[float, float]:
    """Tune gate and side network on one request, mixed by the gate.

    Returns:
        The last loss, and the share of the answer's tokens that are deferred.
    """
    config: DeferConfig = context.config
    batch = Targets(view, context.encoder, [item], layer, "target_new")
    with torch.no_grad():
        run = view.run(batch.rows, taps=[Key(layer)], first=batch.first, last=layer)
    is_read = view.tokens_read(batch.rows)[0, :-1]  # [width - 1], without the target's last token
    keys = run[Key(layer)][0, :-1][is_read].float()  # [tokens, d_in]; the gate does not change what it reads
    # The gate has to be open at the tokens that predict the target, and closed at those of the prompt before them.
    column = torch.arange(len(is_read), device=is_read.device)[is_read]  # [tokens]
    predicts_target = column >= item.start - 1  # [tokens]
    units = _units(view, layer, config)
    before = {name: getattr(network, name).clone() for name in _TENSORS}
    # Trained in units of their steps, so that one rate serves all four tensors.
    steps = {name: torch.zeros_like(before[name], requires_grad=True) for name in _TENSORS}

    def apply_steps() -> None:
        for name, start in before.items():
            setattr(network, name, start + units[name] * steps[name])

    def loss(_: Targets) -> Tensor:
        apply_steps()
        logit = network.logit(keys)
        # Binary cross-entropy of the gate, softplus(-x) = -log sigmoid(x).
        open_loss = nn.functional.softplus(-logit[predicts_target]).mean()
        closed_loss = 0.0
        if not bool(predicts_target.all()):
            closed_loss = nn.functional.softplus(logit[~predicts_target]).mean()
        return batch.loss() + open_loss + closed_loss

    with network.mixing():
        losses = train(context, list(steps.values()), 1.0, config.steps, lambda _: [batch], loss, stop=config.stop_loss)
    with torch.no_grad():
        apply_steps()
        deferred = torch.sigmoid(network.logit(keys[predicts_target])) >= config.threshold
    return losses[-1], round(float(deferred.float().mean()), 3)


def _units(view: ModelView, layer: int, config: DeferConfig) -> dict[str, float]:
    """Return how far one step of Adam moves an entry of each tensor."""
    if config.learning_rate is not None:
        return dict.fromkeys(_TENSORS, config.learning_rate)
    projection = view.layers[layer].block
    logit_step = config.gate_learning_rate
    side_step = config.relative_learning_rate * projection.weight_size()
    # All d_in entries of the gate step at once, so that each moves the logit by its share.
    return {"gate": logit_step / projection.d_in, "bias": logit_step, "side": side_step, "shift": side_step}
