"""``kecore trace``: where in a model a fact is recalled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kecore.cli import options
from kecore.cli.console import Screen, format_score, make_fields, make_table
from kecore.cli.loading import Loading, span
from kecore.cli.machine import measure_cost, show_cost
from kecore.environment import environment

if TYPE_CHECKING:
    from torch import Tensor

    from kecore.model import ModelView
    from kecore.text import Encoder
    from kecore_analysis.trace import Averages, Known, Trace
    from kecore_methods.locate.neurons import Neuron

__all__ = ["trace"]

_CONTEXTS = (3, 10)  # prefixes and their length in tokens: the prompts of a fact that its neurons are found in
_SHOWN = 10


def trace(
    context: typer.Context,
    model: options.Model,
    facts: options.Facts = None,
    limit: options.Limit = None,
    data_format: options.Format = None,
    prompt: options.Prompt = None,
    subject: options.Subject = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A .png file for the heat map.", show_default=False)
    ] = None,
    kinds: Annotated[
        str, typer.Option(metavar="KINDS", help="What is restored: some of hidden,mlp,attention.")
    ] = "hidden,mlp,attention",
    noise: Annotated[
        float, typer.Option(metavar="X", help="Noise, in standard deviations of the subjects' embeddings.", min=0)
    ] = 3.0,
    samples: Annotated[int, typer.Option(metavar="N", help="Noise samples a prompt.", min=1)] = 10,
    window: Annotated[
        int, typer.Option(metavar="N", help="Layers whose blocks or attentions are restored together.", min=1)
    ] = 10,
    any_answer: Annotated[
        bool, typer.Option("--any-answer", help="With --facts: also trace prompts that MODEL answers otherwise.")
    ] = False,
    neurons: Annotated[
        bool, typer.Option("--neurons", help="Also find the answers' knowledge neurons (arXiv 2104.08696).")
    ] = False,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.RemoteCode = False,
    as_json: options.AsJson = False,
) -> None:
    """Show where in MODEL a fact is recalled, and suggest layers to edit.

    Causal tracing (arXiv 2202.05262, section 2): noise on the subject's embeddings makes the answer unlikely; each
    state in turn is set back to what it was without noise. What brings the answer back, carries the fact.
    """
    screen = Screen.of(context)
    chosen = _kinds(kinds)
    asked = _asked(facts, limit, data_format, prompt, subject)
    if out is not None:
        from kecore_analysis.heat import need_matplotlib

        if out.suffix != ".png":
            raise typer.BadParameter(f"--out takes a .png file, got {out}")
        need_matplotlib()
    loaded = Loading(model, device, dtype, trust_remote_code, seed).load(screen)
    with screen.stage("read", "reading the model's structure"):
        from kecore.model import ModelView
        from kecore.text import Encoder
        from kecore_analysis.trace import Tracer, average

        view = ModelView.of(loaded.model)
        encoder = Encoder(loaded.tokenizer, max_length=view.max_length)
        spread = Tracer.spread_of(view, encoder, [known for known, _ in asked])
        tracer = Tracer(
            view, encoder, spread=spread, noise=noise, samples=samples, window=window, kinds=chosen, seed=seed
        )
    with screen.stage("trace", f"tracing {len(asked)} prompts" if facts else f"tracing {asked[0][0].prompt!r}"):
        traces: list[Trace] = []
        kept: list[str] = []
        for known, answer in asked:
            if answer is None or any_answer or _knows(loaded.model, encoder, known.prompt, answer):
                traces.append(tracer.trace(known, screen.progress))
                kept.append(known.prompt)
    if not traces:
        raise typer.BadParameter("the model knows none of these facts; --any-answer traces what it answers instead")
    averages = average(traces)
    found: list[list[Neuron]] | None = None
    if neurons:
        with screen.stage("attribution", "finding knowledge neurons"):
            found = _neurons(view, encoder, kept, seed, screen)
    if out is not None:
        _draw(out, model, traces, averages, window)
    values = {
        "model": model,
        "asked": len(asked),
        "noise": noise,
        "spread": spread,
        "samples": samples,
        "window": window,
        **_values(averages),
        "prompts": [_prompt(item, None if found is None else found[place]) for place, item in enumerate(traces)],
        "heat_map": out,
    }
    spent = measure_cost(screen, view.device)
    _show(screen, values, averages)
    if found is not None:
        screen.show(_neuron_table(found))
    show_cost(screen, spent)
    screen.finish({**values, **environment(view.device), **spent, "warnings": screen.warnings})


def _kinds(text: str) -> list[str]:
    from kecore_analysis.trace import KINDS

    chosen = options.names(text)
    if not chosen or set(chosen) - set(KINDS):
        raise typer.BadParameter(f"--kinds takes some of {','.join(KINDS)}, got '{text}'")
    return [kind for kind in KINDS if kind in chosen]


def _asked(
    facts: Path | None, limit: int | None, data_format: str | None, prompt: str | None, subject: str | None
) -> list[tuple[Known, str | None]]:
    """Prompts, each with the answer that shows that a model knows it; None where any answer will do."""
    from kecore_analysis.trace import Known

    if (facts is None) == (prompt is None) or (prompt is None) != (subject is None):
        raise typer.BadParameter("give --facts FILE, or one prompt by --prompt and --subject")
    if facts is None:
        return [(Known.of((prompt or "").replace("{}", subject or ""), subject or ""), None)]
    from kecore.evaluate import load_records

    requests = load_records(facts, limit=limit, format=data_format).requests
    return [
        (Known(item.text, item.subject_span), item.target if item.ground_truth is None else item.ground_truth)
        for item in requests
    ]


def _knows(model: Any, encoder: Any, prompt: str, answer: str) -> bool:
    """Whether the model's most likely next token begins the answer."""
    import torch

    item = encoder.encode(prompt, answer)
    with torch.no_grad():
        ids = torch.tensor([item.ids[: item.start]], device=model.device)
        return int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax()) == item.ids[item.start]


def _draw(out: Path, model: str, traces: Sequence[Trace], averages: Averages, window: int) -> None:
    from kecore_analysis.heat import write_heat_map
    from kecore_analysis.trace import ROLES

    if len(traces) > 1:
        title = f"{model}: average over {averages.count} prompts"
        write_heat_map(out, averages.effects, ROLES, title, "average indirect effect", window)
        return
    only = traces[0]
    first, last = only.subject
    rows = [f"{token.strip()}{'*' if first <= i <= last else ''}" for i, token in enumerate(only.tokens)]
    title = f"{model}: probability of {only.answer.strip()!r}, {only.clean:.3f} clean, {only.corrupted:.3f} corrupted"
    write_heat_map(out, only.restored, rows, title, "probability", window)


def _values(averages: Averages) -> dict[str, Any]:
    from kecore_analysis.trace import ROLES, suggested_layers

    best, near = suggested_layers(averages) if "mlp" in averages.effects else (None, ())
    return {
        "traced": averages.count,
        "clean": averages.clean,
        "corrupted": averages.corrupted,
        "total_effect": averages.total,
        "effects": {kind: dict(zip(ROLES, t.tolist(), strict=True)) for kind, t in averages.effects.items()},
        "suggested_layer": best,
        "suggested_layers": list(near),
    }


def _prompt(item: Trace, neurons: list[Neuron] | None) -> dict[str, Any]:
    located = {} if neurons is None else {"neurons": [asdict(neuron) for neuron in neurons]}
    return {
        **located,
        "tokens": item.tokens,
        "subject_tokens": list(item.subject),
        "answer": item.answer,
        "clean": item.clean,
        "corrupted": item.corrupted,
        "restored": {kind: restored.tolist() for kind, restored in item.restored.items()},
    }


def _neurons(
    view: ModelView, encoder: Encoder, prompts: Sequence[str], seed: int, screen: Screen
) -> list[list[Neuron]]:
    """Knowledge neurons of the model's own answer to each prompt, bare and behind sampled contexts."""
    from kecore.engine.contexts import sample
    from kecore.text import join_context
    from kecore_methods.locate.neurons import attribute, knowledge_neurons, next_tokens

    with view.frozen():
        prefixes = sample(view, encoder, *_CONTEXTS, seed)
    found: list[list[Neuron]] = []
    for prompt, answer in zip(prompts, next_tokens(view, encoder, prompts), strict=True):
        texts = [join_context(prefix, prompt) for prefix in prefixes]
        scores = attribute(view, encoder, texts, [answer] * len(texts), progress=screen.progress)
        found.append(knowledge_neurons(scores))
    return found


def _neuron_table(found: Sequence[Sequence[Neuron]]) -> Any:
    """The neurons that most prompts share, those of the highest attribution first."""
    members: dict[tuple[int, int], list[float]] = {}
    for neuron in (neuron for located in found for neuron in located):
        members.setdefault((neuron.layer, neuron.index), []).append(neuron.attribution)
    order = sorted(members, key=lambda place: (-len(members[place]), -sum(members[place])))
    rows = [
        [str(layer), str(index), str(len(own)), format_score(sum(own) / len(own))]
        for layer, index in order[:_SHOWN]
        for own in [members[layer, index]]
    ]
    title = f"Knowledge neurons: {len(members)} in all, those of most prompts first"
    return make_table("layer", "neuron", "prompts", "adds to the answer's probability", rows=rows, title=title)


def _show(screen: Screen, values: dict[str, Any], averages: Averages) -> None:
    from kecore_analysis.trace import ROLES

    shown = {
        "prompts": f"{values['traced']} traced of {values['asked']}",
        "answer": f"probability {values['clean']:.3f} clean, {values['corrupted']:.3f} with noise on the subject",
    }
    if values["suggested_layer"] is not None:
        shown["layer"] = (
            f"{values['suggested_layer']}: feed-forward blocks at the subject's tokens count most around it"
        )
        shown["layers"] = f"{span(values['suggested_layers'])}, where they count nearly as much"
    if values["heat_map"] is not None:
        shown["heat map"] = str(values["heat_map"])
    screen.show(make_fields(shown))
    rows = [
        [role, *(_peak(averages.effects[kind][place]) for kind in averages.effects)] for place, role in enumerate(ROLES)
    ]
    title = "Highest average indirect effect, and its layer"
    screen.show(make_table("token", *averages.effects, rows=rows, title=title))


def _peak(effects: Tensor) -> str:
    """The highest effect of a row."""
    best = float(effects.max())
    return format_score(None) if best != best else f"{best:+.3f} at {int(effects.argmax())}"
