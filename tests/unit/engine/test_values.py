"""The batched optimisation against the published procedure, one fact and one prompt at a time."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from engine_worlds import World, make_world
from torch import Tensor, nn

from kecore.api.errors import NonFiniteError
from kecore.api.types import EditRequest
from kecore.batch import RequestBatch
from kecore.engine import values as values_module
from kecore.engine.value_steps import ValueBatch, ValueSettings, all_most_probable, most_probable_in_contexts, said
from kecore.engine.values import Values, optimise_values
from kecore.model import LayerView, ModelView
from kecore.testing import Snapshot
from kecore.text import Encoder, join_context

CONTEXTS = ("", "Therefore it is said", "I know")
LAYER = 1
ADAM = ValueSettings(
    steps=9,
    optimizer="adam",
    learning_rate=0.3,
    clamp=2.0,
    kl_weight=0.2,
    weight_decay=0.5,
    stop_loss=0.0,
    length_penalty=0.0,
    noise=0.0,
)
DESCENT = replace(ADAM, optimizer="gradient", learning_rate=0.3, length_penalty=0.4)


class Prompt(NamedTuple):
    ids: list[int]
    lookup: int
    start: int  # of the target


def prompt(encoder: Encoder, text: str, subject: tuple[int, int], target: str = "") -> Prompt:
    encoded = encoder.encode(text, target)
    return Prompt(list(encoded.ids), encoded.last_token_of(subject), encoded.start)


def prompts(encoder: Encoder, request: EditRequest) -> list[Prompt]:
    out: list[Prompt] = []
    for context in CONTEXTS:
        text = join_context(context, request.text)
        start = text.rindex(request.subject)
        out.append(prompt(encoder, text, (start, start + len(request.subject)), request.target))
    return out


def written(delta: Tensor, place: int, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
    mask = torch.zeros(output.shape[-2], 1)
    mask[place] = 1
    return output + mask * delta


def log_probs(view: ModelView, item: Prompt, delta: Tensor) -> Tensor:
    """Log-probabilities at every token of one unpadded prompt, by the whole model."""
    handle = view.layers[LAYER].site.linear.module.register_forward_hook(partial(written, delta, item.lookup))
    try:
        return view.model(input_ids=torch.tensor([item.ids]), use_cache=False).logits[0].log_softmax(-1)
    finally:
        handle.remove()


def reference_norm(view: ModelView, part: LayerView, item: Prompt) -> float:
    """Norm of the layer's output at the subject; of the projection's where a norm stands behind it."""
    seen: list[Tensor] = []
    module = part.module if part.residual_scale is not None else part.site.linear.module

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    handle = module.register_forward_hook(keep)
    view.model(input_ids=torch.tensor([item.ids]), use_cache=False)
    handle.remove()
    return float(seen[0].reshape(len(item.ids), -1)[item.lookup].norm()) / (part.residual_scale or 1.0)


class Serial(NamedTuple):
    delta: Tensor
    loss: float
    steps: int


def serial(view: ModelView, encoder: Encoder, requests: list[EditRequest], settings: ValueSettings) -> Serial:
    """ROME's ``compute_v`` as published: gather the loss, stop or step, project back into the ball.

    Gradient descent and the length penalty are kecore's own.
    """
    items = [item for request in requests for item in prompts(encoder, request)]
    subject = requests[0].subject
    essence = prompt(encoder, f"{subject} is a", (0, len(subject)))
    norm = reference_norm(view, view.layers[LAYER], items[0])
    delta = torch.zeros(view.width, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=settings.learning_rate)
    momentum = torch.zeros(view.width)
    with torch.no_grad():
        original = log_probs(view, essence, delta)[-1]
    loss = torch.tensor(math.nan)
    for step in range(settings.steps):
        nll = torch.stack(
            [
                -torch.stack([table[place - 1, item.ids[place]] for place in range(item.start, len(item.ids))]).mean()
                for item, table in ((item, log_probs(view, item, delta)) for item in items)
            ]
        ).mean()
        now = log_probs(view, essence, delta)[-1]
        divergence = nn.functional.kl_div(original, now, log_target=True, reduction="sum")
        penalty = settings.weight_decay / norm**2 + settings.length_penalty / norm
        loss = nll + settings.kl_weight * divergence + penalty * delta.norm()
        if loss.item() < settings.stop_loss or step == settings.steps - 1:
            return Serial(delta.detach(), loss.item(), step + 1)
        optimiser.zero_grad()
        loss.backward()
        with torch.no_grad():
            if settings.optimizer == "adam":
                optimiser.step()
            else:
                assert delta.grad is not None
                momentum = 0.5 * momentum + delta.grad / delta.grad.norm()
                share = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step + 1) / settings.steps))
                delta -= settings.learning_rate * share * norm * momentum
            if float(delta.norm()) > settings.clamp * norm:
                delta *= settings.clamp * norm / delta.norm()
    raise AssertionError("the last step returns")


def test_likelihood_and_divergence_and_their_slopes_are_those_of_their_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 11, generator=generator, dtype=torch.float64)
    original = torch.randn(2, 11, generator=generator, dtype=torch.float64).log_softmax(-1)
    token, weight = torch.tensor([3, 0, 10]), torch.tensor([0.5, 2.0, -1.0, 0.3, 4.0], dtype=torch.float64)

    exact = logits.clone().requires_grad_(True)
    now = exact.log_softmax(-1)
    nll = -now[torch.arange(3), token]
    kl = (now[3:].exp() * (now[3:] - original)).sum(-1)
    (slope,) = torch.autograd.grad((torch.cat([nll, kl]) * weight).sum(), exact)

    given = logits.float().requires_grad_(True)
    found = said(given, token, original.float())
    torch.testing.assert_close(torch.cat(found[:2]).double(), torch.cat([nll, kl]).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[2].double(), now[3:].detach(), rtol=1e-5, atol=1e-6)
    (got,) = torch.autograd.grad((torch.cat(found[:2]) * weight.float()).sum(), given)
    torch.testing.assert_close(got.double(), slope, rtol=1e-5, atol=1e-6)

    own = said(given, token, None)
    assert torch.equal(own[1], torch.zeros(2))
    (got,) = torch.autograd.grad(own[1].sum(), given)
    assert not got.any()


def apart(world: Any, facts: list[EditRequest]) -> RequestBatch:
    """A batch in which every fact has a value of its own."""
    return RequestBatch.of(facts, world.encoder).ungrouped()


def compare(world: Any, batch: RequestBatch, settings: ValueSettings, **options: Any) -> None:
    found = optimise_values(world.view, batch, LAYER, CONTEXTS, settings, **options)
    with world.view.frozen():
        for group in range(len(batch.subjects)):
            members = [fact for fact, own in zip(batch.requests, batch.groups, strict=True) if own == group]
            wanted = serial(world.view, world.encoder, members, settings)
            assert int(found.steps[group]) == wanted.steps
            assert float((found.delta[group] - wanted.delta).norm() / wanted.delta.norm().clamp(min=1e-9)) < 1e-4
            assert float(found.loss[group]) == pytest.approx(wanted.loss, rel=1e-4)


@pytest.mark.parametrize("settings", [ADAM, DESCENT], ids=["adam", "gradient"])
def test_batched_equals_serial(world: Any, facts: list[EditRequest], settings: ValueSettings) -> None:
    compare(world, RequestBatch.of(facts, world.encoder), settings)


@pytest.mark.parametrize("settings", [ADAM, DESCENT], ids=["adam", "gradient"])
def test_groups_that_stop_early_leave_the_batch_and_change_nothing(
    world: Any, facts: list[EditRequest], settings: ValueSettings
) -> None:
    batch = apart(world, facts)
    free = optimise_values(world.view, batch, LAYER, CONTEXTS, replace(settings, steps=4))
    stop = float(free.loss.sort().values[1]) * 1.01  # two of four are below this after three updates
    settings = replace(settings, stop_loss=stop)
    found = optimise_values(world.view, batch, LAYER, CONTEXTS, settings)
    assert len(set(found.steps.tolist())) > 1
    compare(world, batch, settings)


def test_without_divergence_and_decay_it_is_the_likelihood_alone(world: Any, facts: list[EditRequest]) -> None:
    compare(world, RequestBatch.of(facts[:2], world.encoder), replace(ADAM, kl_weight=0.0, weight_decay=0.0))


def test_one_step_evaluates_and_moves_nothing(world: Any, facts: list[EditRequest]) -> None:
    found = optimise_values(world.view, apart(world, facts), LAYER, CONTEXTS, replace(ADAM, steps=1))
    assert float(found.delta.norm()) == 0.0
    assert found.steps.tolist() == [1, 1, 1, 1]


@pytest.mark.filterwarnings("ignore:BartForCausalLM is driven:kecore.api.errors.KecoreWarning")
def test_other_architectures(any_world: Any, facts: list[EditRequest]) -> None:
    compare(any_world, RequestBatch.of(facts[:2], any_world.encoder), replace(ADAM, steps=4))


def test_clamp_bounds_the_length(world: Any, facts: list[EditRequest]) -> None:
    settings = replace(ADAM, clamp=0.05, learning_rate=5.0)
    found = optimise_values(world.view, apart(world, facts), LAYER, CONTEXTS, settings)
    torch.testing.assert_close(found.delta.norm(dim=1), 0.05 * found.reference)


def test_micro_batches_make_no_difference(
    world: Any, facts: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    original = values_module._micro_batches

    def spy(*args: Any) -> Any:
        for batch in original(*args):
            seen.append(batch)
            yield batch

    monkeypatch.setattr(values_module, "_micro_batches", spy)
    compare(world, apart(world, facts), replace(ADAM, steps=4), memory=1)
    assert sorted(seen) == [[0], [1], [2], [3]]


def test_noise_is_a_groups_own_and_follows_the_seed(world: Any, facts: list[EditRequest]) -> None:
    settings = replace(DESCENT, noise=0.5, steps=4)

    def found(memory: int, seed: int) -> Tensor:
        return optimise_values(
            world.view, apart(world, facts), LAYER, CONTEXTS, settings, memory=memory, seed=seed
        ).delta

    together = found(2 << 30, 0)
    torch.testing.assert_close(found(1, 0), together, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found(2 << 30, 1), together, rtol=1e-2)


def test_model_and_random_state_are_left_alone(world: Any, facts: list[EditRequest]) -> None:
    world.view.model.train()
    before = Snapshot(world.view.model)
    optimise_values(
        world.view, RequestBatch.of(facts, world.encoder), LAYER, CONTEXTS, replace(ADAM, precision=torch.bfloat16)
    )
    assert before.differences() == []


def test_frozen_weights_in_bfloat16_come_close(world: Any, facts: list[EditRequest]) -> None:
    settings = replace(DESCENT, steps=4)
    exact = optimise_values(world.view, apart(world, facts), LAYER, CONTEXTS, settings)
    rough = optimise_values(
        world.view, apart(world, facts), LAYER, CONTEXTS, replace(settings, precision=torch.bfloat16)
    )
    assert rough.delta.dtype == torch.float32
    assert not torch.equal(rough.delta, exact.delta)
    assert float(torch.cosine_similarity(rough.delta, exact.delta).min()) > 0.9


def test_a_loss_that_explodes_is_an_error(world: Any, facts: list[EditRequest]) -> None:
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        optimise_values(
            world.view,
            apart(world, facts),
            LAYER,
            CONTEXTS,
            replace(ADAM, learning_rate=1e30, clamp=1e38),
        )


def test_progress_reaches_the_total(world: Any, facts: list[EditRequest]) -> None:
    calls: list[tuple[str, int, int]] = []
    optimise_values(
        world.view, apart(world, facts), LAYER, CONTEXTS, replace(ADAM, steps=3),
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert calls[-1] == ("values", 12, 12)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)


@torch.no_grad()
def says(world: Any, request: EditRequest, delta: Tensor) -> list[bool]:
    """Whether the target's tokens are the most probable ones, context by context."""
    out: list[bool] = []
    for item in prompts(world.encoder, request):
        best = log_probs(world.view, item, delta).argmax(-1)
        out.append(best[item.start - 1 : -1].tolist() == item.ids[item.start :])
    return out


def test_a_value_is_done_when_its_target_is_most_probable_everywhere(world: Any, facts: list[EditRequest]) -> None:
    """ENCORE's early stop, checked with the whole model before and after the last step."""
    settings = replace(DESCENT, steps=40, finished=all_most_probable)

    def run(steps: int) -> Values:
        return optimise_values(world.view, apart(world, facts), LAYER, CONTEXTS, replace(settings, steps=steps))

    found = run(40)
    done = [i for i, steps in enumerate(found.steps.tolist()) if steps < 40]
    assert done
    for i in done:
        assert all(says(world, facts[i], found.delta[i]))
    first = min(done, key=lambda i: int(found.steps[i]))
    before = int(found.steps[first]) - 1  # the step that made the last update began from what this leaves
    assert not all(says(world, facts[first], _after(world, facts, settings, before - 1)[first]))


def test_hits_are_counted_in_the_contexts_alone(world: Any, facts: list[EditRequest]) -> None:
    """ENCORE's released stop: at the evaluation that is the third at which all contexts but the bare prompt say it."""
    steps, hits = 14, 3
    settings = replace(DESCENT, steps=steps, finished=most_probable_in_contexts, hits=hits)
    all_steps = optimise_values(world.view, apart(world, facts), LAYER, CONTEXTS, settings).steps
    fact = [facts[int(all_steps.argmin())]]
    found = optimise_values(world.view, apart(world, fact), LAYER, CONTEXTS, settings)
    # Without a stop, the vector that each evaluation sees is that of the run with one, until it stops.
    hit_at: list[int] = []
    for updates in range(steps):
        (vector,) = _after(world, fact, replace(DESCENT, steps=steps), updates)
        if all(says(world, fact[0], vector)[1:]):
            hit_at.append(updates + 1)
    assert int(found.steps[0]) == hit_at[hits - 1] < steps


def _after(world: Any, facts: list[EditRequest], settings: ValueSettings, updates: int) -> Tensor:
    """The vectors after so many updates of a run of ``settings.steps``."""

    class Enough(Exception):
        pass

    taken: list[Tensor] = []
    batch = ValueBatch
    original = batch.step

    def step(self: Any, *, last: bool) -> bool:
        if int(self.steps.max()) == updates:
            taken.append(self.delta.clone())
            raise Enough
        return original(self, last=last)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "step", step)
        with pytest.raises(Enough):
            optimise_values(world.view, apart(world, facts), LAYER, CONTEXTS, settings)
    return taken[0]


def test_no_micro_batch_outlives_its_turn(
    world: World, facts: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the garbage collector, which need not run for minutes."""
    view, encoder = world
    kept: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    begin = ValueBatch.__init__

    def seen(batch: Any, *args: Any, **options: Any) -> None:
        alive.append(sum(ref() is not None for ref in kept))
        begin(batch, *args, **options)
        cache, _ = batch.rows.replay.past
        kept.extend(weakref.ref(layer.keys) for layer in cache.layers if layer.keys is not None)

    monkeypatch.setattr(ValueBatch, "__init__", seen)
    monkeypatch.setattr(values_module, "_ENOUGH", {"cpu": 1})
    gc.collect()
    gc.disable()
    try:
        optimise_values(view, RequestBatch.of(facts, encoder), LAYER, CONTEXTS, replace(DESCENT, steps=2))
    finally:
        gc.enable()
    assert len(alive) > 1
    assert kept
    assert [*alive, sum(ref() is not None for ref in kept)] == [0] * (len(alive) + 1)


def test_how_one_micro_batch_is_driven_says_nothing_of_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one length can share their openings in a model with windows of attention, ragged ones cannot."""
    world = make_world("mistral")
    even = [EditRequest("{} is in", subject, "Rome") for subject in ("Paris", "Italy", "France", "Danube")]
    ragged = [EditRequest("{} is in", subject, "Rome") for subject in ("Spain", "Danielle Darrieux of Antarctica")]

    def found(requests: list[EditRequest]) -> Values:
        return optimise_values(world.view, apart(world, requests), LAYER, CONTEXTS, ADAM)

    separate = [found(even), found(ragged)]
    assert [values.mode for values in separate] == ["shared", "cached"]
    monkeypatch.setattr(values_module, "_micro_batches", lambda *_: iter([[0, 1, 2, 3], [4, 5]]))
    torch.testing.assert_close(found([*even, *ragged]).delta, torch.cat([values.delta for values in separate]))


@pytest.mark.parametrize("context", ["I", "I know"])
def test_contexts_too_short_to_show_a_spread_give_no_noise(
    world: World, facts: list[EditRequest], context: str
) -> None:
    """The noise is in units of the states' deviation, which one token does not have."""
    settings = replace(DESCENT, steps=2, noise=0.5)
    found = optimise_values(world.view, apart(world, facts), LAYER, ["", context], settings)
    assert bool(found.loss.isfinite().all())
