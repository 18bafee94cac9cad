"""Low-rank adapters by the installed ``peft``: put on the model, trained, read off as factors, and taken off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kecore.api.errors import ConfigError, MissingDependencyError, UnsupportedModelError
from kecore.api.method import MethodContext
from kecore.api.progress import quiet_logger
from kecore.batch import RequestBatch
from kecore.edit import LowRank, WeightEdit
from kecore.engine.layers import at_depth, linear_maps
from kecore.engine.tuning import (
    Preserved,
    PreservingConfig,
    Targets,
    Wording,
    batch_need,
    estimate_items,
    in_contexts,
    train,
)
from kecore.memory import Need
from kecore.model import LinearView, ModelView, hooks
from kecore.text import Encoder

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterTraining",
    "adapted",
    "peft_package",
    "plan_adapter",
]

_NAME = "kecore"


class AdapterConfig(PreservingConfig):
    """Configuration that all methods which train an adapter share."""

    rank: int = Field(default=8, ge=1, description="Rank of each factor pair (EasyEdit: 8).")
    alpha: float = Field(default=32, gt=0, description="Factors are scaled by alpha / rank (EasyEdit: 32).")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input while training.")
    targets: Literal["value", "all"] | tuple[str, ...] = Field(
        default="value",
        description="Which linear maps are adapted: the value projections, all of a layer (QLoRA, section 4), or those "
        "whose path ends so (EasyEdit: q_proj, v_proj).",
    )
    layers: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="Adapted layers; None for those between depth_first and depth_last."
    )
    depth_first: float = Field(default=0.0, ge=0, le=1, description="Depth of the first adapted layer.")
    depth_last: float = Field(default=1.0, ge=0, le=1, description="Depth of the last adapted layer.")
    contexts: int = Field(default=0, ge=0, description="Sampled prefixes put before a prompt; none in the papers.")
    context_tokens: int = Field(default=10, ge=1, description="Length of each prefix.")
    steps: int = Field(default=70, ge=1, description="Passes over the requests (EasyEdit: 70).")
    learning_rate: float | None = Field(default=3e-4, gt=0, description="Of Adam; None takes the relative one.")
    relative_learning_rate: float = Field(
        default=1.6e-3,
        gt=0,
        description="Of Adam, as the root mean square of a matrix's first change relative to the matrix's own.",
    )
    batch_size: int = Field(default=32, ge=1, description="Requests per update.")
    stop_loss: float = Field(default=1e-2, ge=0, description="Training ends when a pass has a mean loss below this.")

    def check_installed(self) -> None:
        """Load the package peft.

        Raises:
            MissingDependencyError: it is not installed.
        """
        peft_package()

    def adapted_layers(self, view: ModelView) -> list[int]:
        """Return the adapted layers, ascending.

        Raises:
            LayerError: the model has no such layer.
        """
        if self.layers is None:
            return list(at_depth(view, self.depth_first, self.depth_last))
        return sorted(view.layer(i).index for i in self.layers)

    def adapted_maps(self, view: ModelView) -> dict[str, LinearView]:
        """Return the adapted linear maps by module path.

        Raises:
            ConfigError: no linear map has such a path.
            LayerError: the model has no such layer.
        """
        layers = self.adapted_layers(view)
        if self.targets == "value":
            projections = [view.layers[i].site.linear for i in layers]
            return {projection.name.removesuffix(".weight"): projection for projection in projections}
        all_maps = linear_maps(view, layers)
        if self.targets == "all":
            return all_maps
        targets = {path: linear for path, linear in all_maps.items() if path.endswith(self.targets)}
        if not targets:
            names = sorted({path.rpartition(".")[2] for path in all_maps})
            raise ConfigError(f"no linear map ends in {', '.join(self.targets)}; known: {', '.join(names)}")
        return targets

    def rate(self, maps: Mapping[str, LinearView]) -> float:
        """Return Adam's learning rate, one for all adapted maps.

        Adam's first step sets every entry of ``B`` to the rate, and the entries of ``A`` are uniform within
        ``1 / √d_in``; so the first change of a matrix has a root mean square of ``rate (alpha / r) √(r / 3 d_in)``.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        units: list[float] = []
        for linear in maps.values():
            root_mean_square = float(linear.weight.float().square().mean().sqrt())
            units.append(root_mean_square * (3 * linear.d_in / self.rank) ** 0.5)
        return self.relative_learning_rate * fmean(units) / (self.alpha / self.rank)

    def needs(self, view: ModelView, batch: RequestBatch) -> list[Need]:
        """Return the memory of factors, gradients and moments, and of a batch of requests, which is not cut further."""
        maps = self.adapted_maps(view).values()
        numbers = sum(self.rank * (linear.d_in + linear.d_out) for linear in maps)
        parts = {"factors, gradients and moments": 4 * 4 * numbers}
        items = estimate_items(batch.encodings, self.contexts, self.context_tokens, self.others)
        size = self.batch_size * (self.contexts + 1 + self.others)
        return [batch_need(view, items, size, self.adapted_layers(view)[0], parts, epochs=self.steps)]


def peft_package() -> Any:
    """Import and return the package ``peft``.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        with quiet_logger("bitsandbytes"):  # peft imports it where it is installed
            import peft
    except ImportError as error:
        raise MissingDependencyError(
            f"adapters are trained by the package peft, which cannot be imported ({error}): pip install 'kecore[lora]'"
        ) from error
    return peft


@dataclass(frozen=True, slots=True)
class Adapter:
    """A peft adapter on a model.

    Args:
        tuner: peft's object around the model.
        maps: the adapted linear maps by module path, as they were.
    """

    tuner: BaseTuner
    maps: dict[str, LinearView]

    def layer(self, path: str) -> Any:
        """Return the peft module that stands in a linear map's place."""
        return self.tuner.model.get_submodule(path)

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are trained."""
        parameters: list[nn.Parameter] = []
        for path in self.maps:
            parameters += [parameter for parameter in self.layer(path).parameters() if parameter.requires_grad]
        return parameters

    def updates(self) -> dict[str, LowRank]:
        """Return the update of each adapted weight, as factors, by the weight's name.

        LoRA (arXiv 2106.09685, eq. 3): ``ΔW = (alpha / r) B A``. AdaLoRA (arXiv 2303.10512, eq. 3): ``ΔW = P Λ Q``,
        which peft stores as B, E, A and scales by ``alpha / r``; triplets that were pruned are left out.
        """
        updates: dict[str, LowRank] = {}
        for path, linear in self.maps.items():
            layer = self.layer(path)
            a = _factor(layer.lora_A)  # [rank, d_in]
            b = _factor(layer.lora_B)  # [d_out, rank]
            scale = layer.scaling[_NAME]
            if hasattr(layer, "lora_E"):
                singular_values = layer.lora_E[_NAME].detach().squeeze(1)  # [rank], zero where it was pruned
                unpruned = singular_values != 0
                # The small number is peft's, against a rank of zero.
                scale = scale / (float(layer.ranknum[_NAME].detach()) + 1e-5)
                a, b = a[unpruned], b[:, unpruned] * singular_values[unpruned]
            if a.shape[0]:
                updates[linear.name] = LowRank((scale * b).float().cpu(), a.t().float().contiguous().cpu())
        return updates


def _factor(adapters: Any) -> Tensor:
    """Return the factor of this adapter: LoRA has a linear map there, AdaLoRA the parameter itself."""
    adapter = adapters[_NAME]
    return getattr(adapter, "weight", adapter).detach()


@contextmanager
def adapted(view: ModelView, config: PeftConfig, maps: dict[str, LinearView]) -> Iterator[Adapter]:
    """Put a fresh adapter on a model's linear maps for the length of a block; no weight is copied or changed.

    Args:
        view: the model, frozen.
        config: the kind of adapter; its target modules are set here.
        maps: the adapted linear maps by module path.

    Raises:
        UnsupportedModelError: peft refuses the model.
    """
    peft = peft_package()
    model = view.model
    config.target_modules = list(maps)  # type: ignore[attr-defined] - every kind of LoRA has both
    config.fan_in_fan_out = any(linear.transposed for linear in maps.values())  # type: ignore[attr-defined]
    tuner = {"LORA": peft.LoraModel, "ADALORA": peft.AdaLoraModel}[str(config.peft_type.value)]  # type: ignore[union-attr]
    with ExitStack() as stack:
        if tuner is peft.AdaLoraModel:
            for linear in maps.values():
                # It adds to what a map returns in place, which autograd forbids where a function made that.
                stack.enter_context(hooks.substitute(linear.module, torch.clone))
        stack.callback(_take_off, model, maps, set(model.__dict__))
        try:
            adapter = Adapter(tuner(model, {_NAME: config}, _NAME), maps)
        except (ValueError, NotImplementedError) as error:
            raise UnsupportedModelError(f"peft cannot adapt {type(model).__name__}: {error}") from error
        for parameter in adapter.parameters():
            parameter.data = parameter.data.float()  # Adam's steps would be lost in a half type
        yield adapter


def _take_off(model: nn.Module, maps: dict[str, LinearView], attributes: set[str]) -> None:
    """Put every module back by hand: peft's own way needs a whole adapter, and an interrupt may come at any time."""
    for path, linear in maps.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, linear.module)
    for name in set(model.__dict__) - attributes:
        delattr(model, name)


class AdapterTraining:
    """Training of an adapter: that of LoRA, except for what a method overrides.

    Args:
        config: the method's configuration.
    """

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config

    def peft_config(self, peft: Any, updates: int) -> PeftConfig:
        """Return peft's configuration of the adapter.

        Args:
            peft: the package.
            updates: number of updates in all.
        """
        del updates
        config = self.config
        return peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout)

    def base(self, view: ModelView) -> AbstractContextManager[Any]:
        """Return a context in which the model is what the adapter stands on; by default the model as it is."""
        del view
        return nullcontext()

    def make_batch(
        self,
        view: ModelView,
        encoder: Encoder,
        wordings: Sequence[Wording],
        layer: int,
        preserved: Preserved | None,
    ) -> Any:
        """Return what the loss is computed on, made before the adapter is on the model.

        Args:
            view: the model, frozen.
            encoder: its tokenizer.
            wordings: the requests of an update, in their contexts.
            layer: the lowest adapted layer.
            preserved: prompts whose next token's distribution is to stay.
        """
        items = [wording.encoded for wording in wordings]
        return Targets(view, encoder, items, layer, "target_new", preserved)

    def loss(self, batch: Any, adapter: Adapter) -> Tensor:
        """Return the loss of a batch as :func:`train` takes it; by default the targets' negative log-likelihood."""
        del adapter
        return batch.loss()

    def after_update(self, adapter: Adapter, update: int) -> None:
        """Do what has to be done after an update, which are counted from 1; by default nothing."""


def plan_adapter(
    view: ModelView, batch: RequestBatch, context: MethodContext, method: str, training: AdapterTraining
) -> WeightEdit:
    """Train an adapter on all requests and return its factors; the model is bitwise as before when this returns.

    Args:
        view: the model.
        batch: the facts.
        context: its configuration is an :class:`AdapterConfig`.
        method: name of the method.
        training: how the adapter is trained.
    """
    config: AdapterConfig = context.config
    peft, encoder = peft_package(), context.encoder
    maps, lowest = config.adapted_maps(view), config.adapted_layers(view)[0]
    with view.frozen(), context.stages("contexts"):
        facts = in_contexts(view, context, batch, config.contexts, config.context_tokens)
    with view.frozen(), context.stages("tune"), training.base(view):
        torch.manual_seed(context.seed)
        batches: list[Any] = []
        for start in range(0, len(facts), config.batch_size):
            chunk = facts[start : start + config.batch_size]
            preserved = config.prompts_to_preserve(encoder, [fact[0].request for fact in chunk])
            wordings = list(chain.from_iterable(chunk))
            batches.append(training.make_batch(view, encoder, wordings, lowest, preserved))
        with adapted(view, training.peft_config(peft, config.steps * len(batches)), maps) as adapter:
            losses = train(
                context,
                parameters=adapter.parameters(),
                rate=config.rate(maps),
                epochs=config.steps,
                batches=lambda _: batches,
                loss=lambda batch: training.loss(batch, adapter),
                stop=config.stop_loss,
                after=lambda update: training.after_update(adapter, update),
            )
            updates = adapter.updates()
    return WeightEdit(
        updates=updates,
        base=context.fingerprint(view),
        method=method,
        transposed=frozenset(linear.name for linear in maps.values() if linear.transposed and linear.name in updates),
        config=config.to_json(),
        requests=batch.requests,
        seed=context.seed,
        notes={"loss": losses},
    )
