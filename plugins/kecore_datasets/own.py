"""kecore's own layout, and whatever people write for an editing tool, read as it.

A field may have the name that any tool of the field gives it (:data:`_NAMES`). Instructions, chats and pairs of
preferences become a prompt and a target. What has no meaning here is kept as a note of the record.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from kecore.api.errors import DataFormatError
from kecore.api.types import EditRecord
from kecore.evaluate.fields import Fields, as_text
from kecore.evaluate.formats import Layout, Published
from kecore.evaluate.own_layout import FIELDS, read_record

__all__ = ["OWN", "own_fields"]

# Field of kecore's own layout to the names that others give it, the surest first.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "case_id", "fact_id", "record_id", "edit_id"),
    "prompt": ("prompt", "prompts", "question", "query", "src", "edit_prompt", "requested_prompt"),
    "subject": ("subject", "subjects", "entity", "subject_name"),
    "target": (
        "target", "target_new", "new_target", "targets", "new_answer", "answer_new", "edit_target", "alt",
        "desired_answer", "correct_answer", "new", "chosen",
    ),
    "ground_truth": (
        "ground_truth", "ground_truths", "target_true", "target_old", "old_target", "old_answer", "answer_old",
        "original_answer", "wrong_answer", "old", "rejected",
    ),
    "rephrases": (
        "rephrases", "rephrase", "rephrase_prompt", "rephrase_prompts", "rephrased_prompt", "rephrased_prompts",
        "paraphrase", "paraphrases", "paraphrase_prompt", "paraphrase_prompts", "paraphrased_question",
        "paraphrased_questions", "ood_rephrase",
    ),
    "neighbourhood": (
        "neighbourhood", "neighborhood", "neighborhood_prompts", "neighbourhood_prompts", "neighbors", "neighbours",
    ),
    "generation_prompts": ("generation_prompts", "generation_prompt"),
    "target_aliases": ("target_aliases", "target_alias", "aliases", "answer_aliases"),
    "relation": ("relation", "relation_id"),
}  # fmt: skip
# They hold the target where no field does that is named for it, and else what the model said before.
_ANSWERS = ("answer", "output", "response", "completion", "label")
_LISTS = ("rephrases", "neighbourhood", "generation_prompts", "target_aliases", "truth_aliases", "references")
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
          "bot": "assistant", "system": "system"}  # fmt: skip
_NOTES = ("sources", "reference", "relations", "categories", "subject_id", "subjectid", "subject_ids")
"""Names that are like a known one and mean something else."""
_LIKE = 0.84  # a field at least so like a known one is taken for a slip of the pen


class _Turn(NamedTuple):
    role: str
    text: str


@dataclass
class _Naming:
    """An object whose fields are being told apart.

    Args:
        values: the object.
        remaining: the fields that have not been read, by their folded names.
        named: what was read, by field of the own layout.
        origins: the object's fields that it was read from.
    """

    values: Mapping[str, Any]
    remaining: dict[str, str]
    named: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "") -> _Naming:
        """Begin with all fields that hold something.

        Raises:
            DataFormatError: two names differ in case or punctuation only.
        """
        remaining: dict[str, str] = {}
        for name, value in values.items():
            folded = _fold_name(name)
            if _is_missing(value) or (folded in _NAMES["id"] and isinstance(value, str) and not value.strip()):
                continue
            if folded in remaining:
                raise DataFormatError(
                    f"{where}: the fields '{remaining[folded]}' and '{name}' have one name; rename one"
                )
            remaining[folded] = name
        return cls(values, remaining)

    def read(self, target: str, names: Sequence[str]) -> bool:
        """Read the first of these fields that is there as a field of the own layout, unless that was read before."""
        name = next((name for name in names if name in self.remaining), None)
        if name is None or target in self.named:
            return False
        self.origins[target] = self.remaining.pop(name)
        self.named[target] = self.values[self.origins[target]]
        return True

    def name_all(self) -> None:
        """Read every field that has a meaning in the own layout."""
        self._read_turns()
        self._read_instruction()
        for own in FIELDS:  # its own names come first, and mean what they say
            if own != "target_new":
                self.read(own, [own])
        for own, names in _NAMES.items():
            self.read(own, names)
        self.read("prompt", ["input", "text"])
        if not self.read("target", _ANSWERS):
            self.read("ground_truth", ["answer"])
        self._read_flat_probes()
        self._read_numbered_rephrases()
        for own in ("prompt", "target"):  # one that is there and holds nothing has an error of its own
            if own not in self.named and any(_fold_name(name) in _NAMES[own] for name in self.values):
                self.named[own] = None

    def _read_turns(self) -> None:
        """Read a chat (``messages``, or ShareGPT's ``conversations``): its last reply, and what it replies to."""
        name = next((name for name in ("messages", "conversations", "conversation") if name in self.remaining), None)
        if name is None:
            return
        turns = _turns(self.values[self.remaining[name]])
        if len(turns) < 2 or turns[-1].role != "assistant" or turns[-2].role != "user":
            return
        chat = self.remaining.pop(name)
        self.origins |= {"prompt": chat, "target": chat}
        notes: dict[str, str] = {}
        system = [turn.text for turn in turns if turn.role == "system"]
        if system:
            notes["system"] = "\n".join(system)
        earlier = [f"{turn.role}: {turn.text}" for turn in turns[:-2] if turn.role != "system"]
        if earlier:
            notes["earlier turns"] = "\n".join(earlier)
        self.named |= {"prompt": turns[-2].text, "target": turns[-1].text, **({"notes": notes} if notes else {})}

    def _read_instruction(self) -> None:
        """Read alpaca's ``instruction`` with its ``input`` behind it."""
        if "instruction" not in self.remaining or "prompt" in self.named:
            return
        given = [name for name in ("instruction", "input") if name in self.remaining]
        if any(as_text(self.values[self.remaining[name]]) is None for name in given):
            return  # no text, which is said where the record is read
        names = [self.remaining.pop(name) for name in given]
        texts = [as_text(self.values[name]) or "" for name in names]
        self.named["prompt"] = "\n".join(text.strip() for text in texts if text.strip())
        self.origins["prompt"] = " and ".join(names)

    def _read_flat_probes(self) -> None:
        """Read EasyEdit's flat probes: ``locality_prompt`` with ``locality_ground_truth``, and those of portability."""
        for kind, axis in (("locality", "neighbourhood"), ("portability", "one_hop")):
            self.read(kind, [f"{kind}_inputs"])
            flat = _Naming(self.values, self.remaining)
            if kind in self.named or not flat.read("prompt", [f"{kind}_prompt", f"{kind}_question"]):
                continue
            flat.read("answers", [f"{kind}_ground_truth", f"{kind}_answer"])
            group = {
                "prompt": _split_cell(flat.named["prompt"]),
                "ground_truth": _split_cell(flat.named.get("answers")),
            }
            self.named[kind] = {axis: _pairs(group)}
            self.origins[kind] = " and ".join(flat.origins.values())
        self.read("neighbourhood", ["neighborhood_prompt"])

    def _read_numbered_rephrases(self) -> None:
        """Read columns such as ``rephrase_1`` and ``paraphrase 2`` as one list."""
        names = [name for name in self.remaining if re.fullmatch(r"(?:re|para)phrase(?:_prompt|d_prompt)?_?\d+", name)]
        if not names or "rephrases" in self.named:
            return
        originals = [self.remaining.pop(name) for name in sorted(names)]
        self.named["rephrases"] = [self.values[name] for name in originals]
        self.origins["rephrases"] = " and ".join(originals)


def own_fields(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return an object's fields by the names of kecore's own layout; what has no meaning there stands in ``notes``.

    Args:
        values: the object.
        where: its place, for messages.

    Raises:
        DataFormatError: a field is probably misspelt.
    """
    naming = _Naming.of(values, where)
    naming.name_all()
    _refuse_second_targets(naming, where)
    _write_as_own(naming.named, where)
    _refuse_slips(naming.remaining, naming.named, where)
    notes = {name: values[name] for name in naming.remaining.values()}
    if notes:
        naming.named["notes"] = {**cast("dict[str, Any]", naming.named.get("notes", {})), **notes}
    return naming.named


def _origins(values: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the fields of the own layout that an object's fields are read as, with the names of these."""
    # Of an object that was read, so no name stands there twice.
    naming = _Naming.of(values)
    naming.name_all()
    return naming.origins


def _fold_name(name: str) -> str:
    """Return a field's name in small letters, with one ``_`` for what is neither letter nor digit."""
    return re.sub(r"[\W_]+", "_", str(name).casefold()).strip("_")


def _is_missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _turns(value: object) -> list[_Turn]:
    turns: list[_Turn] = []
    for item in cast("list[Any]", value) if isinstance(value, list) else []:
        if not isinstance(item, Mapping):
            return []
        message = cast("Mapping[str, Any]", item)
        role = _ROLES.get(str(message.get("role", message.get("from", ""))).casefold())
        text = as_text(message.get("content", message.get("value")))
        if role is None or text is None:
            return []
        turns.append(_Turn(role, text))
    return turns


def _refuse_second_targets(naming: _Naming, where: str) -> None:
    """Refuse an object that names two targets, of which one may be the old answer."""
    for name in ("target_new", "new_target", "new_answer", "target"):
        other = naming.remaining.get(name)
        if other is None or "target" not in naming.origins:
            continue
        first, second = _answers(naming.named["target"]), _answers(naming.values[other])
        if second and first != second:
            mine = naming.origins["target"]
            raise DataFormatError(
                f"{where}: '{mine}' is {first[:1]} and '{other}' is {second[:1]}; say which is the target and which "
                f"the old answer, as --map target={other},ground_truth={mine}"
            )


def _split_cell(value: object) -> Any:
    """Return the texts of a cell of a table that holds several, with ``|`` or line breaks between them."""
    text = as_text(value)
    if text is None or not re.search(r"[|\n]", text):
        return value
    return [part.strip() for part in re.split(r"[|\n]", text) if part.strip()]


def _write_as_own(named: dict[str, Any], where: str) -> None:
    """Bring values into the shapes of the own layout: nested targets, several old answers, probes by axis, lists."""
    for own, aliases in (("target", "target_aliases"), ("ground_truth", "truth_aliases")):
        value = named.get(own)
        answers = _answers(value)
        if isinstance(value, list) and len(answers) < len(cast("list[Any]", value)):
            raise DataFormatError(f"{where}: field '{own}' must be a text or a list of texts, got {value!r:.80}")
        if answers:
            named[own] = answers[0]
            if answers[1:]:
                named[aliases] = [*answers[1:], *_answers(_split_cell(named.get(aliases)))]
    for own in _LISTS:
        if own in named:
            named[own] = _split_cell(named[own])
    for kind in ("locality", "portability"):
        if kind in named:
            named[kind] = _axes(named[kind], kind)


def _answers(value: object) -> list[str]:
    """Return the texts of an answer: one text, ``{"str": text}``, or lists of them; empty where it is none of these."""
    text = as_text(value)
    if text is not None:
        return [text]
    if isinstance(value, Mapping):
        return _answers(cast("Mapping[str, Any]", value).get("str"))
    texts: list[str] = []
    for item in cast("list[Any]", value) if isinstance(value, list) else []:
        texts += _answers(item)
    return texts


def _axes(value: object, kind: str) -> Any:
    """Return probes by axis, as ``{axis: [{prompt, answers}]}``, from any of the shapes that tools write."""
    if isinstance(value, list):
        return {"other" if kind == "locality" else "implied": [_probe(item) for item in cast("list[Any]", value)]}
    if not isinstance(value, Mapping):
        return value
    group = cast("Mapping[str, Any]", value)
    if {"prompt", "question"} & group.keys():  # one probe without an axis
        return {"other" if kind == "locality" else "implied": _pairs(group)}
    axes: dict[str, Any] = {}
    for axis, probes in group.items():
        if isinstance(probes, Mapping):
            axes[axis] = _pairs(cast("Mapping[str, Any]", probes))
        elif isinstance(probes, list):
            axes[axis] = [_probe(item) for item in cast("list[Any]", probes)]
        else:
            axes[axis] = probes
    return axes


def _pairs(group: Mapping[str, Any]) -> list[Any]:
    """Return the probes of ``{prompt: [...], ground_truth: [...]}``, which may hold one text each."""
    prompts, answers = group.get("prompt", group.get("question")), group.get("ground_truth", group.get("answer"))
    if not isinstance(prompts, list):
        return [_probe(group)]
    listed = cast("list[Any]", prompts)
    answer_list = cast("list[Any]", answers) if isinstance(answers, list) else [answers] * len(listed)
    probes: list[Any] = []
    for index, prompt in enumerate(listed):
        answer = answer_list[index] if index < len(answer_list) else None
        probes.append({"prompt": prompt} if answer is None else {"prompt": prompt, "answers": answer})
    return probes


def _probe(item: object) -> Any:
    """Return a probe with its answers under the own layout's name."""
    if not isinstance(item, Mapping):
        return item
    probe = dict(cast("Mapping[str, Any]", item))
    for own, others in (("prompt", ("question",)), ("answers", ("ground_truth", "answer", "target"))):
        for other in others:
            if own not in probe and other in probe:
                probe[own] = probe.pop(other)
    return probe


def _refuse_slips(remaining: Mapping[str, str], named: Mapping[str, Any], where: str) -> None:
    """Refuse a field that is probably meant for a known one, which would silently drop probes."""
    known = {own: own for own in FIELDS if own != "notes"}
    for own, names in _NAMES.items():
        known |= dict.fromkeys(names, own)
    for folded, name in remaining.items():
        close = difflib.get_close_matches(folded, known, n=1, cutoff=_LIKE)
        is_further = bool(close) and (folded.startswith(f"{close[0]}_") or folded.endswith(f"_{close[0]}"))
        is_further = is_further or folded in _NOTES
        if close and not is_further and known[close[0]] not in named:
            raise DataFormatError(
                f"{where}: unknown field '{name}'; did you mean '{close[0]}'? If it is a note of yours, give it a name "
                "that is less like that"
            )


def _is_own(values: Mapping[str, Any]) -> bool:
    try:
        named = own_fields(values)
    except DataFormatError:  # its own error is given where the record is read
        return bool({_fold_name(name) for name in values}.intersection(_NAMES["prompt"]))
    return "prompt" in named and "target" in named and not isinstance(named["prompt"], list)


def _read(fields: Fields) -> EditRecord:
    named = own_fields(fields.values, fields.where)
    notes = named.pop("notes", None)
    if isinstance(notes, Mapping):
        named["notes"] = {name: _note(value) for name, value in cast("Mapping[str, Any]", notes).items()}
    elif notes is not None:
        named["notes"] = {"notes": _note(notes)}
    return read_record(Fields(named, fields.where))


def _note(value: object) -> str:
    text = as_text(value)
    return json.dumps(value, ensure_ascii=False, default=str) if text is None else text


OWN = Layout(
    "kecore",
    (),
    "prompt and target, with subject for methods that edit at it, ...",
    _read,
    ("all of them",),
    (Published("your own", "kecore's layout, as JSONL, JSON or CSV", "any", "yours", "`record_to_json` writes it"),),
    detect=_is_own,
    origins=_origins,
    strict=True,
)
"""kecore's own layout: one object a record (:mod:`kecore.evaluate.own_layout`)."""
