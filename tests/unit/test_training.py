"""The training loop and its artifact: killed and continued, refused elsewhere, and given to a method."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor

from kecore import (
    Editor,
    EditRecord,
    EditRequest,
    Encoder,
    MethodConfig,
    MethodContext,
    ModelView,
    Schedule,
    TrainedEditor,
    WeightEdit,
    training,
)
from kecore.api.errors import (
    ArtifactError,
    ArtifactMismatchError,
    ConfigError,
    DataFormatError,
    NonFiniteError,
    UnsupportedCapabilityError,
)
from kecore.api.types import Capabilities
from kecore.batch import RequestBatch
from kecore.edit import LowRank
from kecore.files import write_tensors
from kecore.testing import Snapshot, tiny_model, tiny_tokenizer
from kecore.training import train

RECORDS = [EditRecord(EditRequest("The capital of {}", f"land {i}", "Rome" * (i % 5 + 1))) for i in range(12)]
SHORT = Schedule(steps=7, batch_size=3, held_out=3, evaluate_every=2)


class Toy:
    """Learns the mean length of targets; writes it, and a strength that an edit may choose, into one matrix."""

    class Config(MethodConfig):
        free: ClassVar[frozenset[str]] = frozenset({"strength"})
        rate: float = Field(0.1, description="share of the error that a step takes away")
        strength: float = Field(1.0, description="factor of the update")
        fails_at: int = Field(-1, description="step whose loss is NaN")

    name = "toy"
    capabilities = Capabilities("weights", batch=True, needs_training=True)
    reference = "a test"
    api = (2, 2)
    schedule = SHORT
    seen: ClassVar[list[list[str]]] = []

    def prepare(self, view: ModelView, records: Sequence[EditRecord], context: MethodContext) -> ToyLearner:
        return ToyLearner(context.config)

    def plan(self, view: ModelView, batch: RequestBatch, context: MethodContext) -> WeightEdit:
        mean = context.need_trained(view, self.name)["mean"]
        projection = view.layers[1].site.linear
        update = LowRank(
            torch.full((projection.d_out, 1), float(mean) * context.config.strength), torch.ones(projection.d_in, 1)
        )
        return WeightEdit(
            updates={projection.name: update},
            base=context.fingerprint(view),
            method=self.name,
            config=context.config.to_json(),
        )


class ToyLearner:
    """Its state is a parameter, a moment, and a count; a step also draws."""

    def __init__(self, config: Toy.Config) -> None:
        self.config = config
        self.mean, self.moment, self.count = torch.rand(()), torch.zeros(()), torch.zeros(())

    def step(self, records: Sequence[EditRecord]) -> float:
        Toy.seen.append([record.request.subject for record in records])
        error = self.lengths(records).mean() - self.mean + 1e-3 * torch.rand(())
        self.moment = 0.5 * self.moment + error
        self.mean = self.mean + self.config.rate * self.moment
        self.count = self.count + 1
        return float("nan") if int(self.count) == self.config.fails_at else float(error**2)

    def evaluate(self, records: Sequence[EditRecord]) -> Mapping[str, float]:
        return {"loss": float(((self.lengths(records) - self.mean) ** 2).mean()), "drawn": float(torch.rand(()))}

    def lengths(self, records: Sequence[EditRecord]) -> Tensor:
        return torch.tensor([float(len(record.request.target)) for record in records])

    def state(self) -> Mapping[str, Tensor]:
        return {"mean": self.mean, "moment": self.moment, "count": self.count}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.mean, self.moment, self.count = (state[name].clone() for name in ("mean", "moment", "count"))

    def tensors(self) -> Mapping[str, Tensor]:
        return {"mean": self.mean}


@pytest.fixture(scope="module")
def view() -> ModelView:
    return ModelView.of(tiny_model("llama"))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(tiny_tokenizer())


@pytest.fixture
def trained(view: ModelView, encoder: Encoder) -> TrainedEditor:
    return train(Toy, view, encoder, RECORDS)


def facts(trained: TrainedEditor) -> tuple[Any, ...]:
    """Everything but the times."""
    record = {name: value for name, value in trained.record.items() if name != "seconds"}
    tensors = {name: tensor.tolist() for name, tensor in trained.tensors.items()}
    return tensors, trained.method, trained.config, trained.base, trained.model, trained.seed, record


def interrupt(at: int) -> Callable[[str, int, int], None]:
    def progress(_stage: str, done: int, _total: int) -> None:
        if done == at:
            raise KeyboardInterrupt

    return progress


# The loop.


@pytest.mark.parametrize("kills", [(1,), (4,), (2, 5, 6)])
def test_killed_and_continued_is_undisturbed(
    view: ModelView,
    encoder: Encoder,
    trained: TrainedEditor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kills: Any,
) -> None:
    monkeypatch.setattr(training, "_SAVE_EVERY", 0.0)
    for kill in kills:
        with pytest.raises(KeyboardInterrupt):
            train(Toy, view, encoder, RECORDS, out=tmp_path, progress=interrupt(kill))
    Toy.seen.clear()
    again = train(Toy, view, encoder, RECORDS, out=tmp_path)
    assert len(Toy.seen) == SHORT.steps - kills[-1]  # nothing was done twice
    assert facts(again) == facts(trained)
    assert [file.name for file in tmp_path.iterdir()] == ["trained.safetensors"]


@pytest.mark.parametrize("other", [{"seed": 1}, {"records": RECORDS[1:]}, {"config": Toy.Config(rate=0.2)}])
def test_checkpoint_of_another_training_is_not_continued(
    view: ModelView, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
) -> None:
    monkeypatch.setattr(training, "_SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train(Toy, view, encoder, RECORDS, out=tmp_path, progress=interrupt(4))
    given: dict[str, Any] = {"records": RECORDS, **other}
    assert facts(train(Toy, view, encoder, **given, out=tmp_path)) == facts(train(Toy, view, encoder, **given))


def test_same_seed_same_editor_and_nothing_else_changes(
    view: ModelView, encoder: Encoder, trained: TrainedEditor
) -> None:
    torch.rand(5)
    before = Snapshot(view.model)
    assert facts(train(Toy, view, encoder, RECORDS)) == facts(trained)
    assert not before.differences()
    assert facts(train(Toy, view, encoder, RECORDS, seed=1))[0] != facts(trained)[0]


def test_each_epoch_sees_each_record_once_and_no_held_out_subject(view: ModelView, encoder: Encoder) -> None:
    twice = [*RECORDS, *(replace(r, request=replace(r.request, prompt="A city of {}", id="")) for r in RECORDS)]
    Toy.seen.clear()
    trained = train(Toy, view, encoder, twice, schedule=replace(SHORT, steps=12, batch_size=3))
    subjects = [subject for batch in Toy.seen for subject in batch]
    kept = trained.record["records"]
    assert kept in (18, 20)  # three held-out records, of three subjects or of two, which take their other records along
    assert len(set(subjects)) == kept // 2
    assert {subjects[:kept].count(subject) for subject in subjects} == {2}


def test_curve_begins_untrained_and_the_best_step_is_kept(view: ModelView, encoder: Encoder, tmp_path: Path) -> None:
    # This rate overshoots more with each step, so the best held-out loss comes early.
    wild = Toy.Config(rate=2.5)
    points: list[Mapping[str, float]] = []
    trained = train(Toy, view, encoder, RECORDS, wild, schedule=replace(SHORT, evaluate_every=1), report=points.append)
    curve = trained.record["curve"]
    assert points == curve
    assert [point["step"] for point in curve] == list(range(8))
    assert len({point["drawn"] for point in curve}) == 1
    losses = [point["loss"] for point in curve]
    best = losses.index(min(losses))
    assert trained.record["best_step"] == best < 7
    until = train(Toy, view, encoder, RECORDS, wild, schedule=replace(SHORT, steps=max(1, best), evaluate_every=1))
    assert until.tensors["mean"] == trained.tensors["mean"]


def test_what_cannot_be_trained_is_refused(view: ModelView, encoder: Encoder) -> None:
    from kecore.api import registry

    with pytest.raises(UnsupportedCapabilityError, match="'memit' needs no training"):
        train(registry.default_registry().get("memit"), view, encoder, RECORDS)
    with pytest.raises(DataFormatError, match="3 records are too few to hold out 3"):
        train(Toy, view, encoder, RECORDS[:3])
    with pytest.raises(DataFormatError, match="shares its subject"):
        train(Toy, view, encoder, RECORDS[:1] * 5)
    with pytest.raises(NonFiniteError, match="at step 3"):
        train(Toy, view, encoder, RECORDS, Toy.Config(fails_at=3))
    with pytest.raises(ConfigError, match="'steps' of a training"):
        Schedule(steps=0, batch_size=1)


# The artifact.


def test_saved_editor_is_the_same_editor(trained: TrainedEditor, tmp_path: Path) -> None:
    for path in (tmp_path / "folder", tmp_path / "file.safetensors"):
        loaded = TrainedEditor.load(trained.save(path).parent if path.suffix == "" else trained.save(path))
        assert loaded.inspect() == trained.inspect()
        assert all(torch.equal(tensor, loaded.tensors[name]) for name, tensor in trained.tensors.items())


def test_foreign_files_are_refused(trained: TrainedEditor, tmp_path: Path) -> None:
    pickled = tmp_path / "pickle.safetensors"
    pickled.write_bytes(pickle.dumps({"mean": 1.0}))
    other = write_tensors(tmp_path / "other.safetensors", "weight-edit", {}, {})
    newer = write_tensors(tmp_path / "newer.safetensors", "trained-editor", {"format": 99, "version": "9"}, {})
    damaged = trained.save(tmp_path / "damaged.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    for file, words in ((pickled, "not a safetensors"), (other, "weight-edit"), (newer, "newer"), (damaged, "digest")):
        with pytest.raises(ArtifactError, match=words):
            TrainedEditor.load(file)


def test_another_model_is_refused_by_what_differs(trained: TrainedEditor) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(
        ArtifactMismatchError, match=r"class LlamaForCausalLM against GPT2LMHeadModel.*kecore train toy"
    ):
        Editor(tiny_model("gpt2"), tiny_tokenizer("byte-bpe"), trained=trained)
    same_shape = tiny_model("llama")
    with torch.no_grad():
        next(same_shape.parameters()).mul_(2)
    with pytest.raises(
        ArtifactMismatchError, match=r"another model: fingerprint expected \w{12}, got \w{12} \(float32\)"
    ):
        Editor(same_shape, tokenizer, trained=trained)
    rounded = Editor(tiny_model("llama").to(torch.bfloat16), tokenizer, trained=[trained])
    assert rounded.trained == (trained,)


# Its use.


def test_a_method_asked_for_without_training_says_what_to_run() -> None:
    editor = Editor(tiny_model("llama"), tiny_tokenizer())
    with pytest.raises(UnsupportedCapabilityError, match=r"`kecore train toy MODEL --data FILE --out DIR`.*--trained"):
        editor.edit(RECORDS[0], Toy)


def test_an_edit_has_the_configuration_of_the_training(view: ModelView, encoder: Encoder) -> None:
    trained = train(Toy, view, encoder, RECORDS, Toy.Config(rate=0.3))
    with Editor(tiny_model("llama"), tiny_tokenizer(), trained=trained) as editor:
        with pytest.raises(ArtifactMismatchError, match=r"trained with rate 0\.3, asked 0\.1"):
            editor.edit(RECORDS[0], Toy, rate=0.1)
        edit = editor.edit(RECORDS[0], Toy, strength=0.5)
    assert isinstance(edit, WeightEdit)
    assert edit.config == {"rate": 0.3, "strength": 0.5, "fails_at": -1}
    (update,) = edit.updates.values()
    assert torch.equal(update.matrix(), torch.full_like(update.matrix(), 0.5 * float(trained.tensors["mean"])))


def test_an_editor_of_another_method_is_refused(view: ModelView, encoder: Encoder, trained: TrainedEditor) -> None:
    context = MethodContext(Toy.Config(), encoder, trained=replace(trained, method="other"))
    with pytest.raises(ArtifactMismatchError, match="one of method 'other', not of 'toy'"):
        Toy().plan(view, RequestBatch.of([RECORDS[0].request], encoder), context)
