"""``kecore trace``: where in a model a fact is recalled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kecore.cli import options
from kecore.cli.console import Screen, format_score, make_fields, make_table
from kecore.cli.groups import ReadingOptions, take_groups
from kecore.cli.loading import Loading, span
from kecore.cli.machine import measure_cost, show_cost
from kecore.cli.plugins import help_group
from kecore.environment import environment

if TYPE_CHECKING:
    from torch import Tensor

    from kecore.model import ModelView
    from kecore.text import Encoder
    from kecore_analysis.trace import Averages, Known, Trace
    from kecore_methods.locate.neurons import Neuron

__all__ = ["trace"]

_PREFIXES, _PREFIX_TOKENS = 3, 10
"""Sampled texts, and their tokens, behind which a prompt's neurons are found too."""

_SHOWN = 10
"""Neurons that the table shows."""


@help_group("Measure")
@take_groups
def trace(
    context: typer.Context,
    *,
    model: options.Model,
    facts: options.Facts = None,
    limit: options.Limit = None,
    reading: ReadingOptions,
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
    chosen_kinds = _read_kinds(kinds)
    questions = _read_questions(facts, reading, limit, prompt, subject)
    _check_out(out)
    loaded = Loading(model, device, dtype, trust_remote_code, seed).load(screen)
    with screen.stage("read", "reading the model's structure"):
        from kecore.model import ModelView
        from kecore.text import Encoder
        from kecore_analysis.trace import average
        from kecore_analysis.tracer import Tracer

        view = ModelView.of(loaded.model)
        encoder = Encoder(loaded.tokenizer, max_length=view.max_length, handover=view.handover_ids)
        spread = Tracer.spread_of(view, encoder, [question.known for question in questions])
        tracer = Tracer(
            view, encoder, spread=spread, noise=noise, samples=samples, window=window, kinds=chosen_kinds, seed=seed
        )
    doing = f"tracing {len(questions)} prompts" if facts else f"tracing {questions[0].known.prompt!r}"
    with screen.stage("trace", doing):
        traced = [question for question in questions if any_answer or _knows(loaded.model, encoder, question)]
        traces = [tracer.trace(question.known, screen.progress) for question in traced]
    if not traces:
        raise typer.BadParameter("the model knows none of these facts; --any-answer traces what it answers instead")
    averages = average(traces)
    prompt_values = [_prompt_values(item) for item in traces]
    found_neurons: list[list[Neuron]] = []  # of each prompt
    if neurons:
        with screen.stage("attribution", "finding knowledge neurons"):
            prompts = [question.known.prompt for question in traced]
            found_neurons = _find_neurons(view, encoder, prompts, seed, screen)
        for item, of_prompt in zip(prompt_values, found_neurons, strict=True):
            item["neurons"] = [asdict(neuron) for neuron in of_prompt]
    if out is not None:
        _draw(out, model, traces, averages, window)
    values = {
        "model": model,
        "asked": len(questions),
        "noise": noise,
        "spread": spread,
        "samples": samples,
        "window": window,
        **_average_values(averages),
        "prompts": prompt_values,
        "heat_map": out,
    }
    cost = measure_cost(screen, view.device)
    _show(screen, values, averages)
    if neurons:
        screen.show(_neuron_table(found_neurons))
    show_cost(screen, cost)
    screen.finish({**values, **environment(view.device), **cost, "warnings": screen.warnings})


@dataclass(frozen=True)
class _Question:
    """A prompt to be traced.

    Args:
        known: the prompt with its subject.
        answer: what a model answers that knows it; None where any answer will do.
    """

    known: Known
    answer: str | None = None


def _check_out(out: Path | None) -> None:
    """Refuse a heat map that cannot be written, before a model is loaded."""
    if out is None:
        return
    from kecore_analysis.heat import need_matplotlib

    if out.suffix != ".png":
        raise typer.BadParameter(f"--out takes a .png file, got {out}")
    need_matplotlib()
    options.check_free_file(out, "--out", force=True)


def _read_kinds(text: str) -> list[str]:
    """Read ``--kinds``, in the order of :data:`~kecore_analysis.trace.KINDS`."""
    from kecore_analysis.trace import KINDS

    chosen = options.names(text)
    if not chosen or set(chosen) - set(KINDS):
        raise typer.BadParameter(f"--kinds takes some of {','.join(KINDS)}, got '{text}'")
    return [kind for kind in KINDS if kind in chosen]


def _read_questions(
    facts: Path | None, reading: ReadingOptions, limit: int | None, prompt: str | None, subject: str | None
) -> list[_Question]:
    """Read the prompts of ``--facts``, or the one of ``--prompt``."""
    from kecore_analysis.trace import Known

    if (facts is None) == (prompt is None) or (prompt is None) != (subject is None):
        raise typer.BadParameter("give --facts FILE, or one prompt by --prompt and --subject")
    if prompt is not None and subject is not None:
        return [_Question(Known.of(prompt.replace("{}", subject), subject))]
    questions: list[_Question] = []
    for request in reading.load(str(facts), limit).requests:
        answer = request.target if request.ground_truth is None else request.ground_truth
        questions.append(_Question(Known(request.text, request.subject_span), answer))
    return questions


def _knows(model: Any, encoder: Encoder, question: _Question) -> bool:
    """Return whether the model's most likely next token begins the answer."""
    import torch

    if question.answer is None:
        return True
    encoded = encoder.encode(question.known.prompt, question.answer)
    ids = torch.tensor([encoded.ids[: encoded.start]], device=model.device)  # [1, prompt tokens]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, -1]  # [vocab]
    return int(logits.argmax()) == encoded.ids[encoded.start]


def _draw(out: Path, model: str, traces: Sequence[Trace], averages: Averages, window: int) -> None:
    """Write the heat map: of averages by role, or of a single prompt's tokens."""
    from kecore_analysis.heat import write_heat_map
    from kecore_analysis.trace import ROLES

    if len(traces) > 1:
        title = f"{model}: average over {averages.count} prompts"
        write_heat_map(out, averages.effects, ROLES, title, "average indirect effect", window)
        return
    (item,) = traces
    first, last = item.subject
    rows = [token.strip() for token in item.tokens]
    for index in range(first, last + 1):
        rows[index] += "*"  # the subject
    title = f"{model}: probability of {item.answer.strip()!r}, {item.clean:.3f} clean, {item.corrupted:.3f} corrupted"
    write_heat_map(out, item.restored, rows, title, "probability", window)


def _average_values(averages: Averages) -> dict[str, Any]:
    """Return the averages as JSON values."""
    from kecore_analysis.trace import ROLES, suggested_layers

    best: int | None = None
    layers: tuple[int, ...] = ()
    if "mlp" in averages.effects:
        best, layers = suggested_layers(averages)
    return {
        "traced": averages.count,
        "clean": averages.clean,
        "corrupted": averages.corrupted,
        "total_effect": averages.total,
        "effects": {kind: dict(zip(ROLES, table.tolist(), strict=True)) for kind, table in averages.effects.items()},
        "suggested_layer": best,
        "suggested_layers": list(layers),
    }


def _prompt_values(item: Trace) -> dict[str, Any]:
    """Return the trace of a prompt as JSON values."""
    return {
        "tokens": item.tokens,
        "subject_tokens": list(item.subject),
        "answer": item.answer,
        "clean": item.clean,
        "corrupted": item.corrupted,
        "restored": {kind: restored.tolist() for kind, restored in item.restored.items()},
    }


def _find_neurons(
    view: ModelView, encoder: Encoder, prompts: Sequence[str], seed: int, screen: Screen
) -> list[list[Neuron]]:
    """Find the knowledge neurons of the model's own answer to each prompt, bare and behind sampled contexts."""
    from kecore.engine.contexts import sample
    from kecore.text import join_context
    from kecore_methods.locate.neurons import attribute, knowledge_neurons, next_tokens

    with view.frozen():
        prefixes = sample(view, encoder, _PREFIXES, _PREFIX_TOKENS, seed)
    neurons: list[list[Neuron]] = []
    for prompt, answer in zip(prompts, next_tokens(view, encoder, prompts), strict=True):
        texts = [join_context(prefix, prompt) for prefix in prefixes]
        scores = attribute(view, encoder, texts, [answer] * len(texts), progress=screen.progress)
        neurons.append(knowledge_neurons(scores))
    return neurons


def _neuron_table(neurons: Sequence[Sequence[Neuron]]) -> Any:
    """Return the table of neurons that most prompts share, those of the highest attribution first."""
    attributions: dict[tuple[int, int], list[float]] = {}  # by layer and index, one a prompt
    for of_prompt in neurons:
        for neuron in of_prompt:
            attributions.setdefault((neuron.layer, neuron.index), []).append(neuron.attribution)
    by_rank = sorted(attributions.items(), key=lambda item: (-len(item[1]), -sum(item[1])))
    rows: list[list[str]] = []
    for (layer, index), values in by_rank[:_SHOWN]:
        rows.append([str(layer), str(index), str(len(values)), format_score(fmean(values))])
    title = f"Knowledge neurons: {len(attributions)} in all, those of most prompts first"
    return make_table("layer", "neuron", "prompts", "adds to the answer's probability", rows=rows, title=title)


def _show(screen: Screen, values: dict[str, Any], averages: Averages) -> None:
    """Print the suggested layers and the highest effects."""
    from kecore_analysis.trace import ROLES

    fields = {
        "prompts": f"{values['traced']} traced of {values['asked']}",
        "answer": f"probability {values['clean']:.3f} clean, {values['corrupted']:.3f} with noise on the subject",
    }
    if values["suggested_layer"] is not None:
        fields["layer"] = (
            f"{values['suggested_layer']}: feed-forward blocks at the subject's tokens count most around it"
        )
        fields["layers"] = f"{span(values['suggested_layers'])}, where they count nearly as much"
    if values["heat_map"] is not None:
        fields["heat map"] = str(values["heat_map"])
    screen.show(make_fields(fields))
    rows: list[list[str]] = []
    for index, role in enumerate(ROLES):
        rows.append([role, *(_peak(table[index]) for table in averages.effects.values())])
    title = "Highest average indirect effect, and its layer"
    screen.show(make_table("token", *averages.effects, rows=rows, title=title))


def _peak(effects: Tensor) -> str:
    """Write the highest effect of a row ``[layers]``, and its layer."""
    best = float(effects.max())
    if math.isnan(best):  # no token has the role
        return format_score(None)
    return f"{best:+.3f} at {int(effects.argmax())}"
