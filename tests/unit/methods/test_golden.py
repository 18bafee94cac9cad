"""Published procedures written out by hand on a tiny GPT-2, against what a preset's switches make the methods do.

Nothing here uses kecore's engine: the value is optimised through a hook with plain Adam, the systems are solved in
float64 from the papers' formulas (ROME, arXiv 2202.05262, eq. 2 and 4; MEMIT, 2210.07229, eq. 14; EMMET, 2403.14236,
eq. 9; AlphaEdit, 2410.02355, eq. 12; RLSEdit, 2601.15686, section 4; BetaEdit, 2605.09285; LyapLock, 2505.15702). Where
the released code settles what the papers leave open, it is followed: KL is read at the subject's last token of
"{subject} is a"; ROME's norms are those of the projection's output, MEMIT's those of the hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kecore import Corpus, Editor, EditRequest, WeightEdit
from kecore.engine.contexts import context_lengths
from kecore.statistics import collect_statistics
from kecore.testing import tiny_model, tiny_tokenizer

FACTS = [
    EditRequest("The capital of {} is", "Italy", "Berlin"),
    EditRequest("The company of {} is", "Tim Cook", "Paris"),
]
SAME_SUBJECT = [FACTS[0], EditRequest("A river of {} is", "Italy", "Danube")]
STEPS, RATE, DECAY, KL = 7, 0.1, 0.5, 0.0625
# The switches of the presets, with sizes for a tiny model. Without contexts the bare prompt is all there is.
SWITCHES: dict[str, Any] = {
    "optimizer": "adam", "steps": STEPS, "learning_rate": RATE, "weight_decay": DECAY, "kl_weight": KL,
    "stop_loss": 0.05, "kl_position": "subject", "merge_subjects": False, "contexts": 0, "noise": 0,
    "length_penalty": 0, "gain": 1, "statistics_ridge": 0,
}  # fmt: skip
ROME: dict[str, Any] = {**SWITCHES, "relative_to": "projection", "layers": [2], "clamp": 1.5}
MEMIT: dict[str, Any] = {**SWITCHES, "layers": [0, 1, 2], "clamp": 0.75, "each_context": False}


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Editor:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("\n".join(f"The tower number {i} is in the city of Paris, and Anna speaks it." for i in range(400)))
    session = Editor(tiny_model("gpt2"), tiny_tokenizer())
    session.statistics = collect_statistics(session.view, session.encoder, Corpus.of(text), range(3), tokens=4000)
    return session


@dataclass(frozen=True)
class Fact:
    """A request as tokens: ``ids`` with the target, the subject's last token, where the target starts."""

    ids: Tensor
    lookup: int
    start: int
    essence: Tensor
    essence_lookup: int

    @classmethod
    def of(cls, editor: Editor, request: EditRequest, context: str = "") -> Fact:
        """Locate a request behind a context, joined as in the released code."""

        def tokens(text: str) -> list[int]:
            return editor.encoder.tokenizer(text)["input_ids"]

        assert request.subject is not None
        joined = f"{context}. " if context else ""
        before = joined + request.prompt.partition("{}")[0]
        ids = tokens(f"{joined}{request.text} {request.target}")
        return cls(
            torch.tensor([ids]),
            lookup=len(tokens(before + request.subject)) - 1,
            start=len(tokens(joined + request.text)),
            essence=torch.tensor([tokens(f"{request.subject} is a")]),
            essence_lookup=len(tokens(request.subject)) - 1,
        )


def adding(module: torch.nn.Module, column: int, vector: Tensor, seen: list[Tensor]) -> Any:
    """Add a vector to a module's output at one token, and note what the output was."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        seen.append(states[0, column].detach().clone())
        states = states.clone()
        states[0, column] = states[0, column] + vector
        return (states, *output[1:]) if isinstance(output, tuple) else states

    return module.register_forward_hook(hook)


def optimised(model: Any, module: torch.nn.Module, facts: Sequence[Fact], clamp: float) -> tuple[Tensor, Tensor]:
    """Return the value that is added, and the vector that it is added to: ROME's and MEMIT's released loop.

    Args:
        model: the model.
        module: whose output the value is added to.
        facts: one request in all contexts, the bare prompt first.
        clamp: the value's largest length, relative to the output's at the bare prompt.
    """
    delta = torch.zeros(model.config.n_embd, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=RATE)
    start: Tensor | None = None
    kl_start: Tensor | None = None
    for step in range(STEPS):
        adam.zero_grad()
        seen: list[Tensor] = []
        likelihoods: list[Tensor] = []
        for fact in facts:
            with adding(module, fact.lookup, delta, seen):
                logits = model(input_ids=fact.ids[:, :-1]).logits[0]
            targets = fact.ids[0, fact.start :]
            likelihoods.append(logits.log_softmax(-1)[fact.start - 1 :].gather(1, targets[:, None]).mean())
        bare = facts[0]
        with adding(module, bare.essence_lookup, delta, []):
            essence = model(input_ids=bare.essence).logits[0, bare.essence_lookup].log_softmax(-1)
        start = seen[0] if start is None else start
        kl_start = essence.detach() if kl_start is None else kl_start
        nll = -torch.stack(likelihoods).mean()
        kl = (essence.exp() * (essence - kl_start)).sum()
        loss = nll + KL * kl + DECAY * delta.norm() / start.norm() ** 2
        if loss < 0.05 or step == STEPS - 1:
            break
        loss.backward()
        adam.step()
        with torch.no_grad():
            longest = clamp * start.norm()
            if delta.norm() > longest:
                delta *= longest / delta.norm()
    assert start is not None
    return delta.detach().double(), start.double()


def states(model: Any, facts: Sequence[Fact], module: torch.nn.Module, *, of_input: bool) -> Tensor:
    """Return what a module reads or gives at each subject's last token, ``[facts, d]`` float64."""
    rows: list[Tensor] = []
    for fact in facts:
        seen: list[Tensor] = []

        def hook(_module: Any, args: Any, output: Any, seen: list[Tensor] = seen) -> None:
            output = output[0] if isinstance(output, tuple) else output
            seen.append(args[0] if of_input else output)

        handle = module.register_forward_hook(hook)
        with torch.no_grad():
            model(input_ids=fact.ids)
        handle.remove()
        rows.append(seen[0][0, fact.lookup].double())
    return torch.stack(rows)


def moment(editor: Editor, layer: int) -> Tensor:
    assert editor.statistics is not None
    return editor.statistics.moment(editor.view.layers[layer].site.id).double()


def planned(editor: Editor, method: str, requests: Sequence[EditRequest], **config: Any) -> dict[str, Tensor]:
    with editor:
        edit = editor.edit(list(requests), method, **config)
    assert isinstance(edit, WeightEdit)
    return {name: update.matrix().double() for name, update in edit.updates.items()}


def close(found: Tensor, wanted: Tensor) -> None:
    assert float((found - wanted).norm() / wanted.norm()) < 2e-3


def projection(model: Any, layer: int) -> torch.nn.Module:
    return model.transformer.h[layer].mlp.c_proj


@pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")
def test_rome(editor: Editor) -> None:
    model, fact = editor.model, Fact.of(editor, FACTS[0])
    module = projection(model, 2)
    delta, _ = optimised(model, model.transformer.h[2].mlp, [fact], clamp=1.5)
    key = states(model, [fact], module, of_input=True)[0]
    left = torch.linalg.solve(moment(editor, 2), key)
    wanted = torch.outer(delta / (key @ left), left)  # [d_out, d_in]
    (found,) = planned(editor, "rome", FACTS[:1], **ROME, consistent_key=False).values()
    close(found, wanted)


def spread(
    editor: Editor,
    requests: Sequence[EditRequest],
    solve: Callable[[int, Tensor, Tensor], Tensor],
    layers: Sequence[int],
    contexts: Sequence[str] = (),
) -> dict[int, Tensor]:
    """Return each layer's update of MEMIT's procedure: values at the last, shares ``residual / (layers left)``.

    A key is half the bare prompt's and half the contexts' mean; what is missing is that of the bare prompt.
    ``solve(layer, keys [d_in, u], missing [d_out, u])`` returns the update ``[d_out, d_in]`` of a layer.
    """
    model = deepcopy(editor.model)
    facts = [Fact.of(editor, request) for request in requests]
    behind = [[Fact.of(editor, request, context) for request in requests] for context in contexts]
    last = model.transformer.h[layers[-1]]
    values = [
        optimised(model, last, [fact, *(in_context[i] for in_context in behind)], clamp=0.75)
        for i, fact in enumerate(facts)
    ]
    wanted = torch.stack([delta + start for delta, start in values])  # [u, d_model]
    updates: dict[int, Tensor] = {}
    for index, layer in enumerate(layers):
        keys = states(model, facts, projection(model, layer), of_input=True).T  # [d_in, u]
        if behind:
            of_contexts = [states(model, of, projection(model, layer), of_input=True).T for of in behind]
            keys = (keys + torch.stack(of_contexts).mean(0)) / 2
        missing = (wanted - states(model, facts, last, of_input=False)).T / (len(layers) - index)  # [d_out, u]
        updates[layer] = solve(layer, keys, missing)
        with torch.no_grad():
            projection(model, layer).weight += updates[layer].T.float()
    return updates


@pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")
@pytest.mark.parametrize("requests", [FACTS, SAME_SUBJECT], ids=["two subjects", "one subject"])
def test_memit(editor: Editor, requests: list[EditRequest]) -> None:
    weight = 20.0

    def solve(layer: int, keys: Tensor, missing: Tensor) -> Tensor:
        return missing @ torch.linalg.solve(weight * moment(editor, layer) + keys @ keys.T, keys).T

    wanted = spread(editor, requests, solve, MEMIT["layers"])
    found = planned(editor, "memit", requests, **MEMIT, preservation_lambda=weight)
    for layer, update in wanted.items():
        close(found[f"transformer.h.{layer}.mlp.c_proj.weight"], update)


@pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")
def test_memit_in_contexts(editor: Editor) -> None:
    """Contexts of two lengths; what is left to write is measured on the bare prompt, as released."""
    weight = 20.0

    def solve(layer: int, keys: Tensor, missing: Tensor) -> Tensor:
        return missing @ torch.linalg.solve(weight * moment(editor, layer) + keys @ keys.T, keys).T

    config = {**MEMIT, "contexts": 2, "context_tokens": [3, 5], "residual": "bare", "preservation_lambda": weight}
    with editor:
        edit = editor.edit(FACTS, "memit", **config)
    assert isinstance(edit, WeightEdit)
    bare, *contexts = edit.notes["contexts"]
    assert bare == ""
    wanted = spread(editor, FACTS, solve, MEMIT["layers"], contexts)
    for layer, update in wanted.items():
        close(edit.updates[f"transformer.h.{layer}.mlp.c_proj.weight"].matrix().double(), update)


@pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")
@pytest.mark.parametrize(("requests", "layers"), [(FACTS, [1, 2]), (FACTS[:1], [2])], ids=["a batch", "a fact alone"])
def test_emmet(editor: Editor, requests: list[EditRequest], layers: list[int]) -> None:
    """The softening counts only where there is more than one fact."""
    weight = 0.3

    def solve(layer: int, keys: Tensor, missing: Tensor) -> Tensor:
        whitened = torch.linalg.solve(moment(editor, layer), keys)  # [d_in, u]
        gram = keys.T @ whitened
        if len(gram) > 1:
            gram = gram + weight * torch.eye(len(gram), dtype=gram.dtype)
        return missing @ torch.linalg.solve(gram, whitened.T)

    wanted = spread(editor, requests, solve, layers)
    config = {**MEMIT, "layers": layers, "ridge_lambda": weight}
    found = planned(editor, "emmet", requests, **config)
    for layer, update in wanted.items():
        close(found[f"transformer.h.{layer}.mlp.c_proj.weight"], update)


@pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")
def test_alphaedit(editor: Editor) -> None:
    """The first batch: the projection onto eigenvectors below the threshold, and the length penalty."""
    threshold, penalty = 0.02, 0.5

    def solve(layer: int, keys: Tensor, missing: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(moment(editor, layer))
        kept = vectors[:, values < threshold]
        assert 0 < kept.shape[1] < len(values)
        project = kept @ kept.T
        system = project @ keys @ keys.T + penalty * torch.eye(len(keys), dtype=keys.dtype)
        return missing @ torch.linalg.solve(system, project @ keys).T

    wanted = spread(editor, FACTS, solve, MEMIT["layers"])
    found = planned(editor, "alphaedit", FACTS, **MEMIT, eigenvalue_threshold=threshold, l2_lambda=penalty)
    for layer, update in wanted.items():
        close(found[f"transformer.h.{layer}.mlp.c_proj.weight"], update)


SEQUENCE = [FACTS[:1], FACTS[1:], [EditRequest("The food of {} is", "Anna", "Danube")]]


def follow(editor: Editor, method: str, solve: Callable[[int, Tensor, Tensor], Tensor], **config: Any) -> None:
    """Edit one batch after another, and compare each with the procedure by hand."""
    with editor:
        for requests in SEQUENCE:
            wanted = spread(editor, requests, solve, MEMIT["layers"])
            edit = editor.edit(requests, method, **MEMIT, **config)
            assert isinstance(edit, WeightEdit)
            for layer, update in wanted.items():
                close(edit.updates[f"transformer.h.{layer}.mlp.c_proj.weight"].matrix().double(), update)


@pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")
def test_rlsedit(editor: Editor) -> None:
    """The objective's normal equations over all edits so far, instead of the recursion."""
    pretrained, anchor = 0.3, 20.0  # lambda squared and mu squared
    systems: dict[int, Tensor] = {}

    def solve(layer: int, keys: Tensor, missing: Tensor) -> Tensor:
        identity = torch.eye(len(keys), dtype=keys.dtype)
        earlier = systems.get(layer, pretrained * identity + anchor * moment(editor, layer))
        systems[layer] = earlier + keys @ keys.T
        return missing @ torch.linalg.solve(systems[layer], keys).T

    follow(editor, "rlsedit", solve, preservation_lambda=anchor, norm_lambda=pretrained)


@pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")
def test_betaedit(editor: Editor) -> None:
    """The released system with whole projectors; the null space is found anew after the second fact."""
    threshold, penalty, leakage = 0.02, 0.5, 30.0
    history: dict[int, list[Tensor]] = {}

    def solve(layer: int, keys: Tensor, missing: Tensor) -> Tensor:
        preserved, edits = moment(editor, layer), history.setdefault(layer, [])
        cache = sum((one @ one.T for one in edits), torch.zeros_like(preserved))
        protected = preserved
        if len(edits) == 2:
            protected = (cache / 2 + leakage * preserved) / (leakage + 1)
        values, vectors = torch.linalg.eigh(protected)
        kept = vectors[:, values < threshold]
        assert 0 < kept.shape[1] < len(values)
        project = kept @ kept.T
        system = project @ (keys @ keys.T + cache + leakage * preserved)
        system = system + penalty * torch.eye(len(keys), dtype=keys.dtype)
        edits.append(keys)
        return missing @ torch.linalg.solve(system, project @ keys).T

    numbers = {"eigenvalue_threshold": threshold, "l2_lambda": penalty, "leakage_lambda": leakage, "refresh": 2}
    follow(editor, "betaedit", solve, **numbers)


@pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")
def test_lyaplock(editor: Editor) -> None:
    """The released recursion in whole weights: ``left A⁻¹`` with the sums of values and keys, and the queue ``a Z``."""
    weight, bound = 5.0, 1.01
    first = {layer: projection(editor.model, layer).weight.detach().double().T.clone() for layer in MEMIT["layers"]}
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    queues: dict[int, float] = dict.fromkeys(MEMIT["layers"], 1.0)
    first_losses: dict[int, float] = {}
    pending: dict[int, Tensor] = {}

    def solve(layer: int, keys: Tensor, missing: Tensor) -> Tensor:
        # All layers before it have been written in the copy that `spread` works on; this one is as in the model.
        current = projection(editor.model, layer).weight.detach().double().T  # W [d_out, d_in]
        preserved = moment(editor, layer)
        if layer in pending:  # what follows each edit in the released code
            deviation, last = current - first[layer], pending[layer]
            loss = float((deviation @ preserved @ deviation.T).trace())
            limit = bound * first_losses.setdefault(layer, loss)
            queues[layer] = max(queues[layer] + loss / limit - 1, 1.0)
            values, moments = sums.get(layer, (torch.zeros_like(current), torch.zeros_like(preserved)))
            sums[layer] = (values + current @ last @ last.T, moments + last @ last.T)
        pending[layer] = keys
        system = keys @ keys.T + queues[layer] * weight * preserved
        left = missing @ keys.T + queues[layer] * weight * (first[layer] - current) @ preserved
        if layer in sums:
            values, moments = sums[layer]
            system, left = system + moments, left + values - current @ moments
        return torch.linalg.solve(system, left.T).T

    follow(editor, "lyaplock", solve, preservation_lambda=weight, bound=bound)
    assert max(queues.values()) > 1


@pytest.mark.parametrize("switch", [{"kl_position": "last"}, {"relative_to": "hidden"}])
@pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")
def test_the_switches_change_the_edit(editor: Editor, switch: dict[str, Any]) -> None:
    (published,) = planned(editor, "rome", FACTS[:1], **ROME).values()
    (other,) = planned(editor, "rome", FACTS[:1], **{**ROME, **switch}).values()
    assert float((published - other).norm() / published.norm()) > 1e-2


def test_contexts_of_several_lengths() -> None:
    """ROME's ten contexts of 5 tokens and ten of 10 are as many lengths, the shorter ones first."""
    assert context_lengths(20, (5, 10)) == [5] * 10 + [10] * 10
    assert context_lengths(3, 7) == [7, 7, 7]


@pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")
def test_encore(editor: Editor) -> None:
    """The first batch: the update's own norm beside the preserved keys (arXiv 2502.01636, eq. 8)."""
    preserved, norm = 20.0, 0.7

    def solve(layer: int, keys: Tensor, missing: Tensor) -> Tensor:
        system = preserved * moment(editor, layer) + keys @ keys.T + norm * torch.eye(len(keys), dtype=keys.dtype)
        return missing @ torch.linalg.solve(system, keys).T

    wanted = spread(editor, FACTS, solve, MEMIT["layers"])
    config = {**MEMIT, "preservation_lambda": preserved, "norm_lambda": norm, "stop_most_probable": False}
    found = planned(editor, "encore", FACTS, **config)
    for layer, update in wanted.items():
        close(found[f"transformer.h.{layer}.mlp.c_proj.weight"], update)


@pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")
def test_rect(editor: Editor) -> None:
    """MEMIT's update, of which the entries stay that change their weight most, relative to it (arXiv 2401.04700)."""
    weight, kept = 20.0, 0.4

    def solve(layer: int, keys: Tensor, missing: Tensor) -> Tensor:
        update = missing @ torch.linalg.solve(weight * moment(editor, layer) + keys @ keys.T, keys).T
        change = (update / projection(editor.model, layer).weight.detach().T.double()).abs()
        least = change.flatten().sort(descending=True).values[round(kept * change.numel()) - 1]
        return update * (change >= least)

    wanted = spread(editor, FACTS, solve, MEMIT["layers"])
    found = planned(editor, "rect", FACTS, **MEMIT, preservation_lambda=weight, rect_kept=kept)
    for layer, update in wanted.items():
        close(found[f"transformer.h.{layer}.mlp.c_proj.weight"], update)


def fine_tuned(editor: Editor, request: EditRequest, bound: float, *, at_last: bool) -> Tensor:
    """Return the change of one weight by the constrained fine-tuning of ROME's release, ``[d_out, d_in]``.

    Adam on the weight, which is cut to within ``bound`` of what it was after each step (arXiv 2012.00363). EasyEdit's
    ``prompt_last`` raises all tokens of the target where the prompt ends, its ``target_new`` each at its own place.
    """
    model = deepcopy(editor.model)
    weight = projection(model, 2).weight
    original = weight.detach().clone()
    fact = Fact.of(editor, request)
    targets = fact.ids[0, fact.start :]
    adam = torch.optim.Adam([weight.requires_grad_(True)], lr=1e-3)
    for _ in range(4):
        adam.zero_grad()
        logits = model(input_ids=fact.ids[:, :-1]).logits[0].log_softmax(-1)
        rows = logits[fact.start - 1].expand(len(targets), -1) if at_last else logits[fact.start - 1 :]
        (-rows.gather(1, targets[:, None]).mean()).backward()
        adam.step()
        with torch.no_grad():
            weight.copy_(weight.clamp(original - bound, original + bound))
    return (weight.detach() - original).T.double()


@pytest.mark.parametrize("bound", [2e-3, 1.0])
def test_ft_l(editor: Editor, bound: float) -> None:
    config = {"layer": 2, "steps": 4, "learning_rate": 1e-3, "stop_loss": 0, "norm_constraint": bound}
    (found,) = planned(editor, "ft-l", FACTS[:1], **config).values()
    close(found, fine_tuned(editor, FACTS[0], bound, at_last=True))


def test_ft_m(editor: Editor) -> None:
    config = {"layer": 2, "steps": 4, "learning_rate": 1e-3, "stop_loss": 0, "norm_constraint": 2e-3}
    (found,) = planned(editor, "ft-m", FACTS[:1], **config).values()
    close(found, fine_tuned(editor, FACTS[0], 2e-3, at_last=False))


@pytest.mark.filterwarnings("ignore::kecore.api.errors.KecoreWarning")
def test_ote_se_with_error_feedback(editor: Editor) -> None:
    """The released systems of RECT with an error cache, whole: ``(R Kᵀ - E M) (M + K Kᵀ)⁻¹`` and then the cut."""
    weight, kept = 20.0, 0.4
    systems: dict[int, Tensor] = {}
    caches: dict[int, Tensor] = {}

    def solve(layer: int, keys: Tensor, missing: Tensor) -> Tensor:
        earlier = systems.get(layer, weight * moment(editor, layer))
        systems[layer] = earlier + keys @ keys.T
        right = missing @ keys.T - caches.get(layer, torch.zeros_like(missing @ keys.T))
        whole = torch.linalg.solve(systems[layer], right.T).T  # [d_out, d_in]
        change = (whole / projection(editor.model, layer).weight.detach().T.double()).abs()
        least = change.flatten().sort(descending=True).values[round(kept * change.numel()) - 1]
        cut = whole * (change >= least)
        caches[layer] = (cut - whole) @ systems[layer]
        return cut

    follow(editor, "ote-se + rect", solve, preservation_lambda=weight, rect_kept=kept)
