"""SERAC's scope, attention and losses against loops in float64, and its answers in batches and while writing."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from make_records import make_record
from memory_setting import FACT, logits, scores_batches_as_single_prompts, writes_with_a_cache_as_without
from meta_setting import RECORDS, SHORT, setting
from torch import Tensor

from kecore import Editor, EditRecord, EditRequest, MethodContext, ModuleEdit, TrainedEditor, training
from kecore.api.errors import ArtifactMismatchError, ConfigError, DataFormatError
from kecore.edit import load_edit
from kecore.engine.passes import Passes
from kecore.inference import score_continuations
from kecore.model.sites import Output, Start
from kecore.testing import tiny_model, tiny_tokenizer
from kecore.training import train
from kecore_methods.memory.serac import EditMemory, Serac, SeracConfig
from kecore_methods.memory.serac_learner import SeracLearner, _Batch
from kecore_methods.memory.serac_network import FAR, NOTHING, Entries, Reading, SeracNetwork, not_any

OTHER = EditRequest("The company of {} is", "Tim Cook", "French Danube")
NEIGHBOURS = ("The capital of France is", "The iPhone", "Where does the Danube")
WIDTH, RANK = 6, 4


def network(seed: int = 0) -> SeracNetwork:
    """A network of random parameters."""
    made, generator = SeracNetwork(WIDTH, RANK), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        made.states.deviation.copy_(0.5 + torch.rand(2 * WIDTH, generator=generator))
    return made


def memory(net: SeracNetwork) -> Entries:
    """Two edits of different lengths."""
    states = torch.randn(2, 5, 2 * WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return Entries.stack([net.entry(states[0], 1, 2, [3, 4, 5, 6, 7]), net.entry(states[1, :3], 0, 1, [8, 9, 2])])


@cache
def trained(architecture: str = "llama") -> TrainedEditor:
    view, encoder = setting(architecture)
    return train(Serac, view, encoder, RECORDS, SeracConfig(rank=16), schedule=replace(SHORT, steps=30))


@pytest.fixture
def editor() -> Editor:
    return Editor(tiny_model("llama"), tiny_tokenizer("llama-like"), trained=trained())


def by_hand(net: SeracNetwork, states: Tensor, mask: Tensor, entries: Entries) -> list[list[list[float]]]:
    """``-log g`` of each row, token and edit, one number at a time."""
    reading, _ = net.read(states)
    unit, scalars = 4.0 / (4 * RANK), {name: float(value) for name, value in net.scalars.items()}
    rows: list[list[list[float]]] = []
    for r in range(len(states)):
        row: list[list[float]] = []
        for t in range(states.shape[1]):
            each: list[float] = []
            for e in range(len(entries.lengths)):
                subjects = [
                    math.dist(reading.subject[r, s], entries.subjects[e]) ** 2 for s in range(t + 1) if mask[r, s]
                ]
                own = math.dist(reading.prompt[r, t], entries.prompts[e]) ** 2
                distance = math.exp(scalars["subject"]) * min(subjects, default=FAR) + math.exp(scalars["prompt"]) * own
                each.append(unit * distance if mask[r, t] else FAR)
            row.append(each)
        rows.append(row)
    return rows


@torch.no_grad()
def test_scope_is_the_distance_of_embeddings() -> None:
    net = network()
    entries = memory(net)
    states = torch.randn(3, 6, 2 * WIDTH, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1, :2], mask[2, 4:] = False, False
    found = net.distance(net.read(states)[0], mask, entries)
    torch.testing.assert_close(found.each, torch.tensor(by_hand(net, states, mask, entries)), rtol=1e-4, atol=1e-4)
    # A text that comes in two passes is as near as one that comes in one.
    first = net.distance(net.read(states[:1, :4])[0], mask[:1, :4], entries)
    second = net.distance(net.read(states[:1, 4:])[0], mask[:1, 4:], entries, first.nearest)
    torch.testing.assert_close(torch.cat([first.each, second.each], 1), found.each[:1])


@torch.no_grad()
def test_an_edit_is_in_force_until_another_is_or_it_falls_silent() -> None:
    net = network()
    entries = memory(net)
    states = torch.randn(4, 7, 2 * WIDTH, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(4, 7, dtype=torch.bool)
    mask[1, :3] = False
    each = by_hand(net, states, mask, entries)
    probabilities = sorted(math.exp(-min(token)) for row, real in zip(each, mask, strict=True) for token in [
        token for token, is_real in zip(row, real, strict=True) if is_real
    ])  # fmt: skip
    threshold = (probabilities[-4] + probabilities[-5]) / 2
    side = EditMemory("a", "b", "c", "d", threshold, WIDTH, RANK, 2, 5)
    side.load_state_dict({**{f"network.{k}": v for k, v in net.state_dict().items()}, **entries.tensors()})
    query, lapses = net.read(states)[0].query, 0
    wanted: list[list[int]] = []
    for r, (row, real) in enumerate(zip(each, mask, strict=True)):
        now, found = -1, list[int]()
        for t, (token, is_real) in enumerate(zip(row, real, strict=True)):
            if is_real and math.exp(-min(token)) >= threshold:
                now = token.index(min(token))
            elif is_real and now >= 0 and float(net.attention(query[r, t : t + 1], entries, now)[0, 0]) > 0.5:
                now, lapses = -1, lapses + 1
            found.append(now if is_real else -1)
        wanted.append(found)
    assert {edit for row in wanted for edit in row} == {-1, 0, 1}
    assert 0 < lapses < 4
    passes = Passes(torch.nn.Identity())
    assert side.in_force(states, mask, passes)[0].tolist() == wanted
    # The same in passes of one token, as they come while a text is written.
    passes.text_state = {}
    parts = [side.in_force(states[:, t : t + 1], mask[:, t : t + 1], passes)[0] for t in range(7)]
    assert torch.cat(parts, 1).tolist() == wanted


@torch.no_grad()
def test_counterfactual_is_attention_over_the_edit() -> None:
    net = network()
    entries = memory(net)
    generator = torch.Generator().manual_seed(4)
    hidden, states = torch.randn(3, WIDTH, generator=generator), torch.randn(3, 2 * WIDTH, generator=generator)
    head = torch.randn(10, WIDTH, generator=generator)
    query = net.read(states)[0].query
    scalars = {name: math.exp(float(value)) for name, value in net.scalars.items()}
    for index, follows in ((0, [4, 5, 6, 7, NOTHING]), (1, [9, 2, NOTHING])):
        found = net.counterfactual(hidden, query, entries, index, head)
        for i in range(3):
            weights = [math.exp(5 + float(net.scalars["nothing"]))]
            weights += [
                math.exp(10 * scalars["sharp"] * float(query[i].double() @ entries.keys[index, j].double()))
                for j in range(len(follows))
            ]
            total = torch.zeros(WIDTH, dtype=torch.float64)
            for weight, token in zip(weights[1:], follows, strict=True):
                if token != NOTHING:
                    row = head[token].double()
                    row = (row - row.mean()) / (row.var(correction=0) + 1e-5).sqrt()
                    total += weight / sum(weights) * (row + net.up.weight.double() @ (net.down.weight.double() @ row))
            size = hidden[i].double().square().mean().sqrt()
            wanted = hidden[i].double() + scalars["gain"] * size * total
            torch.testing.assert_close(found[i].double(), wanted, rtol=1e-4, atol=1e-4)


def test_cross_entropy_is_that_of_the_likeliest_edit() -> None:
    distance = torch.tensor([[0.3, 2.0], [5.0, 4.0]], requires_grad=True)
    found = not_any(distance)
    torch.testing.assert_close(found, -torch.log(1 - torch.exp(-torch.tensor([0.3, 4.0]))))
    found.sum().backward()
    assert distance.grad is not None
    assert (distance.grad != 0).tolist() == [[True, False], [False, True]]
    assert math.isfinite(float(not_any(torch.zeros(1, 1))))  # a negative that is the edit itself


def test_training_sees_what_the_edited_model_does() -> None:
    """Losses of the learner's short passes against those of whole passes of a model with the memory beside it."""
    view, encoder = setting()
    config = SeracConfig(rank=16)
    view.model.eval()
    with view.frozen():
        learner = Serac().prepare(view, RECORDS, MethodContext(config, encoder))
        assert isinstance(learner, SeracLearner)
        parts = [learner._prepare(record) for record in RECORDS[:3]]
        with torch.no_grad():
            batch = _Batch(learner.network, parts)
            found = learner._answers(batch, batch.owner)
            side = EditMemory.of(view, config, learner.network, batch.memory)
            losses: list[float] = []
            for item, end, owner in zip(batch.wordings, batch.ends, batch.owner, strict=True):
                gold = torch.full((1, len(item.ids)), owner)
                side.in_force = lambda states, mask, _, gold=gold: (gold, side.network.read(states)[0].query)  # type: ignore[method-assign]
                with side.on(view.model):
                    every = view.model(input_ids=torch.tensor([item.ids])).logits[0].log_softmax(-1)
                losses.append(-float(torch.stack([every[j - 1, item.ids[j]] for j in range(item.start, end)]).mean()))
            assert float(found.loss) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_near_misses_differ_in_subject_or_in_prompt() -> None:
    view, encoder = setting()
    facts = [
        EditRequest(prompt, f"land {i}", "Rome") for i in range(3) for prompt in ("The city of {} is", "{} lies by")
    ]
    with view.frozen():
        records = [EditRecord(fact) for fact in facts]
        learner = Serac().prepare(view, records, MethodContext(SeracConfig(rank=16), encoder))
    for fact in facts:
        about_another, another = learner._near_misses(fact)
        assert about_another in {other.text for other in facts if other.subject != fact.subject}
        assert about_another in {fact.prompt.replace("{}", other.subject) for other in facts}
        assert another == next(o.text for o in facts if o.subject == fact.subject and o.prompt != fact.prompt)
    assert learner._near_misses(facts[0]) == learner._near_misses(facts[0])


def test_silence_is_learnt_behind_the_target() -> None:
    """Where what follows the target is told from it, and only there."""
    view, encoder = setting()
    fact = EditRequest("The city of {} is", "land 99", "Vienna")
    with view.frozen(), torch.no_grad():
        learner = Serac().prepare(view, RECORDS, MethodContext(SeracConfig(rank=16), encoder))
        probes = RECORDS[0].probes_of("locality")
        told, merged = (
            _Batch(learner.network, [learner._prepare(record)])
            for record in (EditRecord(fact, probes), EditRecord(replace(fact, target="Rome"), probes))
        )
        assert told.wordings[0].ids[: told.ends[0]] == encoder.encode(fact.text, "Vienna").ids
        tail = told.query[0, told.ends[0] : len(told.wordings[0].ids)]
        assert len(tail) > 3
        attention = learner.network.attention(tail, told.memory, 0)
        torch.testing.assert_close(attention.sum(1), torch.ones(len(tail)))
        assert float(told.silence_loss()) == pytest.approx(-float(attention[:, 0].log().mean()), rel=1e-5)
        assert len(merged.wordings[0].ids) == merged.ends[0]  # "Rome." is one token of this vocabulary
        assert float(merged.silence_loss()) == 0


def test_scope_loss_is_binary_cross_entropy() -> None:
    view, encoder = setting()
    with view.frozen(), torch.no_grad():
        learner = Serac().prepare(view, RECORDS, MethodContext(SeracConfig(rank=16), encoder))
        batch = _Batch(learner.network, [learner._prepare(record) for record in RECORDS[:3]])
        inside, outside = list[float](), list[float]()
        for row, each in enumerate(batch.distance):
            real = each[batch.mask[row]]
            if row < len(batch.wordings):
                own = batch.owner[row]
                inside.append(-math.log(math.exp(-float(real[batch.wordings[row].start - 1, own]))))
                real = real[:, [e for e in range(3) if e != own]]
            outside.append(-math.log(1 - math.exp(-float(real.min()))))
        wanted = sum(inside) / len(inside) + sum(outside) / len(outside)
        assert float(batch.scope_loss()) == pytest.approx(wanted, rel=1e-4)


def test_measured_accuracy_is_that_of_an_edited_model(editor: Editor) -> None:
    view, encoder = setting()
    with view.frozen():
        config = SeracConfig.make(trained().config)
        learner = Serac().prepare(view, RECORDS, MethodContext(config, encoder))
        learner.network.load_state_dict(dict(trained().tensors))
        figures = learner.evaluate(RECORDS[:4])
        assert "rephrase accuracy" in figures
        bare = learner.evaluate(
            [
                replace(record, probes=tuple(probe for probe in record.probes if probe.kind != "paraphrase"))
                for record in RECORDS[:4]
            ]
        )
        assert set(figures) - set(bare) == {"rephrase accuracy", "rephrases in scope"}
    editor.edit([record.request for record in RECORDS[:4]], Serac)
    pairs = [(record.request.text, record.request.target) for record in RECORDS[:4]]
    scores = score_continuations(editor.view, editor.encoder, pairs)
    right = [sum(a == b for a, b in zip(s.ids, s.argmax, strict=True)) / len(s.ids) for s in scores]
    assert figures["edit accuracy"] == bare["edit accuracy"] == pytest.approx(sum(right) / 4, abs=1e-6)


def test_training_continues_bit_for_bit_and_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view, encoder = setting()
    config = SeracConfig(rank=16)
    whole = train(Serac, view, encoder, RECORDS, config, schedule=SHORT)
    monkeypatch.setattr(training, "_SAVE_EVERY", 0.0)

    def stop(_stage: str, done: int, _total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Serac, view, encoder, RECORDS, config, schedule=SHORT, out=tmp_path, progress=stop)
    again = train(Serac, view, encoder, RECORDS, config, schedule=SHORT, out=tmp_path)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in whole.tensors.items())
    curve = trained().record["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert curve[-1]["answer loss"] < curve[0]["answer loss"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_prompts_out_of_scope_are_bitwise_as_they_were(architecture: str) -> None:
    kind = "byte-bpe" if architecture == "gpt2" else "llama-like"
    editor = Editor(tiny_model(architecture), tiny_tokenizer(kind), trained=trained(architecture))
    before = [logits(editor, text) for text in NEIGHBOURS]
    own = logits(editor, FACT.text)
    edit = editor.edit([FACT, OTHER], Serac, threshold=0.99)  # a tiny model's prompts are all alike
    assert all(torch.equal(logits(editor, text), old) for text, old in zip(NEIGHBOURS, before, strict=True))
    after = logits(editor, FACT.text)
    assert torch.equal(after[:, :-1], own[:, :-1])
    assert not torch.equal(after[:, -1], own[:, -1])
    editor.revert()
    assert torch.equal(logits(editor, FACT.text), own)
    assert isinstance(edit, ModuleEdit)


def test_batches_score_as_single_prompts_do(editor: Editor) -> None:
    editor.edit([FACT, OTHER], Serac)
    scores_batches_as_single_prompts(editor, (FACT.text, *NEIGHBOURS, f"Where? {OTHER.text}", OTHER.text))


def test_writing_with_a_cache_is_writing_without_one(editor: Editor) -> None:
    """Greedy text in a left-padded batch of mixed scope with a cache, against a full pass for every token."""
    editor.edit([FACT, OTHER], Serac)
    writes_with_a_cache_as_without(editor, [FACT.text, OTHER.text, NEIGHBOURS[1]])


def test_further_edits_join_the_memory(editor: Editor, tmp_path: Path) -> None:
    first = editor.edit(FACT, Serac)
    second = editor.edit(OTHER, Serac)
    both = Editor(tiny_model("llama"), tiny_tokenizer("llama-like"), trained=trained())
    one = both.edit([FACT, OTHER], Serac)
    assert isinstance(one, ModuleEdit)
    assert isinstance(second, ModuleEdit)
    pairs = zip(one.effect.tensors().values(), second.effect.tensors().values(), strict=True)
    assert all(torch.allclose(a.float(), b.float(), atol=1e-5) for a, b in pairs)
    again = editor.edit(EditRequest(FACT.prompt, FACT.subject, "Berlin"), Serac)
    assert [edit.notes["entries"] for edit in (first, second, again)] == [1, 2, 2]
    scores = score_continuations(editor.view, editor.encoder, [(FACT.text, "Berlin"), (FACT.text, FACT.target)])
    assert scores[0].mean > scores[1].mean
    own = logits(editor, OTHER.text)
    file = again.save(tmp_path / "edit")
    editor.revert(3)
    load_edit(file).attach(editor.model)
    assert torch.equal(logits(editor, OTHER.text), own)


def test_pass_that_skips_a_layer_is_the_models_own(editor: Editor) -> None:
    """A pass that begins above the layer where subjects are read knows nothing of them."""
    rows = editor.encoder.rows([editor.encoder.encode(FACT.text).ids])
    with torch.no_grad():
        below = editor.view.run(rows, taps=[Output(2)], last=2)[Output(2)]
        own = editor.view.run(rows).logits
        editor.edit(FACT, Serac)
        assert not torch.equal(editor.view.run(rows).logits, own)
        assert torch.equal(editor.view.run(rows, first=Start(3, below)).logits, own)


def test_threshold_is_free_and_other_fields_are_not(editor: Editor) -> None:
    edit = editor.edit(FACT, Serac, threshold=0.9)
    assert edit.config["threshold"] == 0.9
    with pytest.raises(ArtifactMismatchError, match="rank 16, asked 8"):
        editor.edit(OTHER, Serac, rank=8)


def test_bad_input_is_refused() -> None:
    view, encoder = setting()
    with pytest.raises(ConfigError, match="subject_layer 3 is above layer 1"):
        SeracConfig(subject_layer=3, layer=1).read_layers(view)
    bare = [
        make_record(EditRequest("The city of {} is", f"land {i}", "Rome"), (f"land {i} has a city named",))
        for i in range(6)
    ]
    with pytest.raises(DataFormatError, match="nothing says what is out of its scope"):
        train(Serac, view, encoder, bare, schedule=SHORT)


def test_reading_does_not_depend_on_a_states_size() -> None:
    net = network()
    states = torch.randn(2, 3, 2 * WIDTH)
    one, other = net.read(states)[0], net.read(1000 * states)[0]
    assert isinstance(one, Reading)
    torch.testing.assert_close(one.prompt, other.prompt, rtol=1e-3, atol=1e-3)


@pytest.mark.real_model
def test_real_neighbours_are_bitwise_as_they_were(smollm2: tuple[Any, Any]) -> None:
    """An untrained classifier holds the edit's own prompt in scope, and prompts about other subjects out of it."""
    editor = Editor(*smollm2)
    fact = EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English")
    texts = ("The mother tongue of Léon Blum is", "The capital of France is")
    before = [logits(editor, text) for text in texts]
    config = SeracConfig(rank=64)
    context = MethodContext(config, editor.encoder)
    with editor.view.frozen():
        record = make_record(fact, ("Danielle Darrieux, a native",))
        others = [RECORDS[i].with_probes("paraphrase", ()) for i in range(3)]
        learner = Serac().prepare(editor.view, [record, *others], context)
    trained = TrainedEditor(learner.tensors(), "serac", config.to_json(), editor.base)
    editor.trained = trained
    with editor:
        own = logits(editor, fact.text)
        editor.edit(fact, "serac")
        assert all(torch.equal(logits(editor, text), old) for text, old in zip(texts, before, strict=True))
        assert not torch.equal(logits(editor, fact.text), own)
