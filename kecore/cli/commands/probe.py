"""``kecore probe``: what kecore finds in a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kecore.cli import options
from kecore.cli.console import Screen, make_fields, make_table
from kecore.cli.loading import Loading
from kecore.cli.machine import measure_cost, show_cost

if TYPE_CHECKING:
    from torch import nn

    from kecore.model import ModelView
    from kecore.models import LoadedModel
    from kecore.selftest import Trial

__all__ = ["probe"]


def probe(
    context: typer.Context,
    model: options.Model,
    every_layer: Annotated[bool, typer.Option("--all", help="List every layer, also where all are alike.")] = False,
    self_test: Annotated[
        bool,
        typer.Option("--self-test", help="Make one edit with a cheap method of each family, check it, and revert it."),
    ] = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Show what kecore finds in a model.

    The layers, the matrices that edits change, and the rest that edits rely on. Each finding was verified by
    perturbing the model; one that cannot be edited is refused with the reason. With --self-test the exit code is 1
    where a method fails.
    """
    screen = Screen.of(context)
    loaded = Loading(model, device, dtype, trust_remote_code, seed).load(screen)
    with screen.stage("read", "reading the model's structure"):
        from kecore.api.identity import type_name
        from kecore.model import ModelView

        view = ModelView.of(loaded.model)
    tokenizer = loaded.tokenizer
    values: dict[str, Any] = {
        "model": model,
        "source": loaded.source,
        "class": type(loaded.model).__name__,
        "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        "dtype": type_name(view.dtype),
        "device": str(view.device),
        "width": view.width,
        "context_length": view.max_length,
        "final_norm": _describe_module(view, view.final_norm),
        "unembedding": _describe_module(view, view.unembedding),
        "tied_embedding": _is_tied(view),
        "tokenizer": type(tokenizer).__name__,
        "offsets": bool(getattr(tokenizer, "is_fast", False)),
        "chat_template": bool(getattr(tokenizer, "chat_template", None)),
        "layers": _layers(view),
    }
    _show(screen, values, every_layer)
    trials: list[Trial] = []
    if self_test:
        trials = _try_out(screen, loaded, seed)
        values["self_test"] = [asdict(trial) for trial in trials]
        _show_trials(screen, trials)
    spent = measure_cost(screen, view.device)
    show_cost(screen, spent)
    screen.finish({**values, **spent, "warnings": screen.warnings})
    if any(trial.outcome == "fails" for trial in trials):
        raise typer.Exit(1)


def _try_out(screen: Screen, loaded: LoadedModel, seed: int) -> list[Trial]:
    with screen.stage("self-test", "editing with a method of each family"):
        from kecore.selftest import try_out

        return try_out(loaded.model, loaded.tokenizer, seed=seed, progress=screen.progress)


def _show_trials(screen: Screen, trials: Sequence[Trial]) -> None:
    """Show what was edited, and what came of it with each method."""
    from kecore.selftest import FACT

    rows: list[tuple[str, str, str, str]] = []
    for trial in trials:
        change = "" if trial.before is None or trial.after is None else f"{trial.before:.2f} to {trial.after:.2f}"
        rows.append((trial.family, trial.method, trial.outcome, trial.reason or change))
    title = "Self-test: one edit each, checked and taken off bit for bit"
    screen.show(make_table("family", "method", "", "log-probability of the target", rows=rows, title=title))
    screen.show(f"The fact: {FACT.text} {FACT.target}")


def _layers(view: ModelView) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = []
    for layer in view.layers:
        values: dict[str, Any] = {
            "index": layer.index,
            "name": layer.name,
            "class": type(layer.module).__name__,
            "block": layer.block.name,
            "residual_scale": layer.residual_scale,
            "experts": None,
            "no_sites": layer.no_sites or None,
        }
        if layer.sites:
            linear = layer.sites[0].linear
            values["value_projection"] = linear.name
            values["shape"] = [linear.d_out, linear.d_in]
            values["storage"] = "[d_in, d_out]" if linear.transposed else "[d_out, d_in]"
        if layer.experts is not None:
            values["value_projection"] = f"{layer.experts.name}.{layer.experts.attribute}"
            values["experts"] = {"count": layer.experts.count, "of_a_token": layer.experts.top_k}
        layers.append(values)
    return layers


def _describe_module(view: ModelView, module: nn.Module | None) -> str | None:
    """Name a module's path and class."""
    if module is None:
        return None
    path = next((name for name, candidate in view.model.named_modules() if candidate is module), "?")
    return f"{path} ({type(module).__name__})"


def _is_tied(view: ModelView) -> bool:
    embedding: Any = view.model.get_input_embeddings()  # type: ignore[operator, union-attr]
    return embedding.weight is getattr(view.unembedding, "weight", None)


def _describe_storage(layer: dict[str, Any]) -> str:
    """Write shape and storage of a layer's matrix: ``[576 out, 1536 in]``."""
    if layer["no_sites"]:
        return "not edited"
    d_out, d_in = layer["shape"]
    shape = f"[{d_out} out, {d_in} in]" if layer["storage"] == "[d_out, d_in]" else f"[{d_in} in, {d_out} out]"
    if layer["experts"] is None:
        return shape
    return f"{layer['experts']['count']} x {shape}, {layer['experts']['of_a_token']} a token"


def _show(screen: Screen, values: dict[str, Any], every_layer: bool) -> None:
    layers: list[dict[str, Any]] = values["layers"]
    offsets = "with offsets" if values["offsets"] else "without offsets: cannot be edited with"
    template = "chat template" if values["chat_template"] else "no chat template"
    screen.show(
        make_fields(
            {
                "model": f"{values['model']} ({values['class']})",
                "parameters": f"{values['parameters']:,} in {values['dtype']} on {values['device']}",
                "layers": f"{len(layers)} of {layers[0]['class']}, {layers[0]['name']} to {layers[-1]['name']}",
                "width": str(values["width"]),
                "context": f"{values['context_length']:,} tokens" if values["context_length"] else "no limit",
                "final norm": values["final_norm"] or "none",
                "unembedding": values["unembedding"] + (", tied to the embedding" if values["tied_embedding"] else ""),
                "tokenizer": f"{values['tokenizer']}, {offsets}, {template}",
            }
        )
    )
    kinds = {(_describe_storage(layer), layer["residual_scale"]) for layer in layers}
    listed = layers
    if len(kinds) == 1 and len(layers) >= 4 and not every_layer:
        listed = [layers[0], layers[-1]]
    rows = [
        (
            str(layer["index"]),
            layer.get("value_projection", layer["block"]),
            _describe_storage(layer),
            "normed" if layer["residual_scale"] is None else f"{layer['residual_scale']:.4g}",
        )
        for layer in listed
    ]
    title = "Value projections: what edits change"
    screen.show(make_table("layer", "parameter", "stored as", "scale", rows=rows, title=title))
    reason = next((layer["no_sites"] for layer in layers if layer["no_sites"]), None)
    if reason is not None:
        screen.show(f"Not edited: {reason}. Methods that change no weights work (`kecore methods`).")
    if len(listed) < len(layers):
        screen.show(f"The {len(layers) - 2} layers between are alike; --all lists them.")
