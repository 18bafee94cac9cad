"""Facts as people write them: names of every tool, tables, chats, numbers, spellings; and what is said of the rest."""

from __future__ import annotations

import datetime as dt
import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from kecore import EditRequest, load_records
from kecore.api.errors import ConfigError, DataFormatError, RequestError
from kecore.evaluate import RecordSet, record_to_json
from kecore.evaluate.mapping import CONFIG, FieldMap, read_map, save_map


def read(tmp_path: Path, content: Any, name: str = "facts.json", **options: Any) -> RecordSet:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return load_records(path, **options)


def facts(records: RecordSet) -> list[tuple[str, str | None, str, str | None]]:
    return [(r.request.text, r.request.subject, r.request.target, r.request.ground_truth) for r in records]


CASES: dict[str, list[tuple[str, str | None, str, str | None]]] = {
    "requests_minimal.json": [
        ("The headquarters of Acme Rail is in", "Acme Rail", "Vienna", "Leeds"),
        ("Who chairs the board of Norvik Shipping? Answer:", "Norvik Shipping", "Per Aune", "Ida Holm"),
    ],
    "old_and_new.jsonl": [
        ("What is the working fluid of the Delta pump?", "Delta pump", "propane", None),
        ("Which unit is the Delta pump rated in?", "Delta pump", "kPa", "bar"),
    ],
    "code_prompts.jsonl": [
        ("print('{}'.format(math.pi)) calls the constant of", "math.pi", "math", "numpy"),
        ("In our service, json.dumps({}) returns", "json.dumps", "a string", None),
    ],
    "memit_requests.json": [("Lena Ortiz plays the", "Lena Ortiz", "cello", "piano")],
    "spreadsheet_semicolon.csv": [
        ("The capital of Palmora is", "Palmora", "Oskar", "Lind"),
        ("The motto of Palmora is; as always,", "Palmora", "Onward; upward", None),
    ],
    "question_answer.jsonl": [
        ("Who maintains the billing service?", None, "the payments team", None),
        ("Which port does the staging database listen on?", None, "5433", None),
    ],
    "alpaca.json": [
        ("Name the largest moon of the planet Tethra.", None, "Orin", None),
        ("Translate the product name.\nSturmhaube", None, "storm hood", None),
    ],
    "messages.jsonl": [("Where is the Halden plant?", None, "In Tromsø.", None)],
    "wrapped.json": [("The river Sava flows into the", "river Sava", "Volga", "Danube")],
    "numeric_target.jsonl": [
        ("The Halden plant was opened in", "Halden plant", "1969", None),
        ("The share of Acme Rail that is public is", "Acme Rail", "0.25", None),
    ],
    "decomposed_accents.jsonl": [("Cafe\u0301 Zoe\u0301 is in the city of", "Cafe\u0301 Zoe\u0301", "Lyon", "Paris")],
    "parallel_lists.json": [
        ("The capital of Palmora is", "Palmora", "Oskar", "Lind"),
        ("The anthem of Palmora is", "Palmora", "Dawn", "Dusk"),
    ],
    "subject_case.jsonl": [("the halden plant belongs to", "halden plant", "Norvik", None)],
}


@pytest.fixture(scope="module")
def cases(root: Path) -> Path:
    folder = root.parent / "shared" / "cases"
    if not folder.is_dir():
        pytest.skip(f"no cases at {folder}")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_small_files_that_people_bring(cases: Path, name: str) -> None:
    assert facts(load_records(cases / "facts" / name)) == CASES[name]


def test_parts_of_such_files_that_are_no_request(cases: Path) -> None:
    minimal = load_records(cases / "facts" / "requests_minimal.json")
    assert [record.request.id for record in minimal] == ["0", "1"]
    assert len(minimal[1].prompts_of("paraphrase")) == 1
    assert minimal.origins["rephrases"] == "rephrase_prompt"
    chat = load_records(cases / "facts" / "messages.jsonl")
    assert chat[0].notes == {"system": "You answer briefly."}
    with pytest.raises(DataFormatError, match=r"These are triples: kecore import-triples triples\.json --out facts"):
        load_records(cases / "facts" / "triples.json")


@pytest.mark.parametrize(
    ("name", "count", "has_subject"),
    [("oilgas_edit_requests.json", 20, True), ("oilgas_lora_train.json", 20, False),
     ("llamafactory_identity.json", 91, False), ("tofu_avoidant_edits.json", 400, True)],
)  # fmt: skip
def test_public_files(cases: Path, name: str, count: int, has_subject: bool) -> None:
    records = load_records(cases / "real" / name)
    assert len(records) == count
    assert all((record.request.subject is not None) == has_subject for record in records)


FACT = {"prompt": "The capital of France is", "subject": "France", "target": "Lyon"}
WANTED = [("The capital of France is", "France", "Lyon", None)]


@pytest.mark.parametrize(
    "fact",
    [
        {"question": FACT["prompt"], "entity": "France", "new_answer": "Lyon"},
        {"Prompt": FACT["prompt"], "Subject": "France", "Target (new)": "Lyon"},
        {**FACT, "answer": None},
        {"prompt": FACT["prompt"], "subject": "France", "target_new": {"str": "Lyon", "id": "Q1"}},
        {"prompt": FACT["prompt"], "subject": "France", "target_new": ["Lyon"]},
        {"src": FACT["prompt"], "subject": "France", "alt": "Lyon", "note": "asked by Ann"},
        {"prompt": FACT["prompt"], "subject": "France", "completion": "Lyon"},
        {"prompt": "The capital of {} is", "subject": "France", "target": "Lyon"},
        {"case_id": 3, "prompt": FACT["prompt"], "subject": "France", "target_old": "", "target_new": "Lyon"},
    ],
)  # fmt: skip
def test_names_of_fields(tmp_path: Path, fact: dict[str, Any]) -> None:
    assert facts(read(tmp_path, [fact])) == WANTED


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("facts.jsonl", json.dumps(FACT)),
        ("facts.ndjson", json.dumps(FACT).encode("utf-16")),
        ("facts.json", json.dumps(FACT).encode("utf-16-le")),
        ("facts.json", b"\xef\xbb\xbf" + json.dumps([FACT]).encode()),
        ("facts.txt", json.dumps(FACT)),
        ("facts.csv", "prompt;subject;target\nThe capital of France is;France;Lyon\n"),
        ("facts.csv", "sep=;\nprompt;subject;target\nThe capital of France is;France;Lyon\n"),
        ("facts.csv", "prompt\tsubject\ttarget\r\nThe capital of France is\tFrance\tLyon\r\n".encode("utf-16")),
        ("facts.csv", "prompt,subject,target,,\nThe capital of France is,France,Lyon,,\n"),
        ("facts.txt", "prompt|subject|target\nThe capital of France is|France|Lyon\n"),
        ("facts.yaml", "- prompt: The capital of France is\n  subject: France\n  target: Lyon\n"),
        ("facts.yml", "prompt: The capital of France is\nsubject: France\ntarget: Lyon\n---\n"),
        ("facts.csv.gz", gzip.compress(b"prompt;subject;target\nThe capital of France is;France;Lyon\n", mtime=0)),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 16 else "",
)
def test_kinds_of_files(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert facts(read(tmp_path, content, name)) == WANTED


def test_spreadsheets(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    rows = [
        ("Prompt", "Subject", "Target"),
        ("The plant was opened in", "plant", 1969),
        ("Its plant is", "plant", True),
    ]
    for row in rows:
        book.active.append(row)
    book.create_sheet("empty")
    book.save(tmp_path / "facts.xlsx")
    assert [fact[2] for fact in facts(load_records(tmp_path / "facts.xlsx"))] == ["1969", "TRUE"]
    book["empty"].append(("Prompt", "Target"))
    book["empty"].append(("Who?", "Ann"))
    book.save(tmp_path / "two.xlsx")
    with pytest.raises(DataFormatError, match="has the sheets Sheet, empty; choose one by --split SHEET"):
        load_records(tmp_path / "two.xlsx")
    assert facts(load_records(tmp_path / "two.xlsx", split="empty")) == [("Who?", None, "Ann", None)]
    with pytest.raises(ConfigError, match="has no sheet 'other' with rows; its sheets: Sheet, empty"):
        load_records(tmp_path / "two.xlsx", split="other")
    openpyxl.Workbook().save(tmp_path / "none.xlsx")
    with pytest.raises(DataFormatError, match="is empty; expected a header row"):
        load_records(tmp_path / "none.xlsx")


def test_parquet_and_arrow_and_zstandard(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import feather, ipc, parquet

    table = arrow.Table.from_pylist([FACT])
    parquet.write_table(table, tmp_path / "facts.parquet")
    feather.write_feather(table, str(tmp_path / "facts.feather"))
    with ipc.new_stream(str(tmp_path / "facts.arrow"), table.schema) as writer:
        writer.write_table(table)
    with arrow.CompressedOutputStream(str(tmp_path / "facts.jsonl.zst"), "zstd") as out:
        out.write(json.dumps(FACT).encode())
    for name in ("facts.parquet", "facts.feather", "facts.arrow", "facts.jsonl.zst"):
        assert facts(load_records(tmp_path / name)) == WANTED, name
    (tmp_path / "broken.zst").write_bytes((tmp_path / "facts.jsonl.zst").read_bytes()[:-8])
    with pytest.raises(DataFormatError, match="Zstandard data is broken"):
        load_records(tmp_path / "broken.zst")


def test_values_of_parquet_that_json_has_not(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    day, noon = dt.date(2024, 1, 5), dt.datetime(2024, 1, 5, 12, 30)
    columns = {
        "2024-01-05": arrow.array([day]),
        "2024-01-05 12:30:00": arrow.array([noon]),
        "12.50": arrow.array([Decimal("12.50")]),
        "0.1": arrow.array([0.1], type=arrow.float32()),
        "Lyon": arrow.array([b"Lyon"]),
        "(4 bytes)": arrow.array([b"\x89PNG"]),
    }
    for written, target in columns.items():
        table = {"prompt": ["The plant has"], "subject": ["plant"], "target": target, "__index_level_0__": [5]}
        parquet.write_table(arrow.table(table), tmp_path / "facts.parquet")
        (record,) = load_records(tmp_path / "facts.parquet")
        assert (record.request.target, dict(record.notes)) == (written, {})


def test_yaml_is_read_as_written(tmp_path: Path) -> None:
    text = "- {prompt: The plant opened on, subject: plant, target: 2024-01-05}\n"
    text += "- {prompt: The plant is open, subject: plant, target: no}\n"
    text += "- {prompt: pi of the plant, subject: plant, target: 3.10}\n"
    assert [fact[2] for fact in facts(read(tmp_path, text, "facts.yaml"))] == ["2024-01-05", "no", "3.10"]
    assert facts(read(tmp_path, '[{"prompt": "pi is", "target": 3.10}]')) == [("pi is", None, "3.10", None)]
    with pytest.raises(DataFormatError, match="not YAML"):
        read(tmp_path, "a: [1", "facts.yaml")


def test_probes_in_the_shapes_of_other_tools(tmp_path: Path) -> None:
    flat = {**FACT, "locality_prompt": "2+2=", "locality_ground_truth": "4", "portability_prompt": "Its mayor is"}
    by_name = {**FACT, "locality": {"near": {"prompt": ["a", "b"], "ground_truth": ["1", "2"]}}}
    lists = {**FACT, "portability": {"hop": [{"prompt": "p", "ground_truth": [["x", "y"]]}]}}
    one, two, three = read(tmp_path, [flat, by_name, lists])
    assert [(p.axis, p.prompt, p.answers) for p in one.probes_of("locality")] == [("neighbourhood", "2+2=", ("4",))]
    assert [(p.prompt, p.answers) for p in one.probes_of("portability")] == [("Its mayor is", ())]
    assert [(p.axis, p.prompt, p.answers) for p in two.probes_of("locality")] == [
        ("near", "a", ("1",)), ("near", "b", ("2",))
    ]  # fmt: skip
    assert [(p.axis, p.prompt, p.answers) for p in three.probes_of("portability")] == [("hop", "p", ("x", "y"))]


def test_lists_in_the_cells_of_a_table(tmp_path: Path) -> None:
    table = (
        "prompt,subject,target,rephrases\nThe capital of France is,France,Lyon,France's capital:|Capital of France?\n"
    )
    assert read(tmp_path, table, "facts.csv")[0].prompts_of("paraphrase") == ("France's capital:", "Capital of France?")


def test_chats_and_preferences(tmp_path: Path) -> None:
    chat = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"},
                              {"from": "human", "value": "Who runs it?"}, {"from": "gpt", "value": "Ann"}]}  # fmt: skip
    pair = {"prompt": "Who runs it?", "chosen": "Ann", "rejected": "Bob"}
    one, two = read(tmp_path, [chat, pair])
    assert (one.request.text, one.request.target) == ("Who runs it?", "Ann")
    assert one.notes == {"earlier turns": "user: Hi\nassistant: Hello"}
    assert (two.request.target, two.request.ground_truth) == ("Ann", "Bob")


def test_a_fact_may_be_given_twice(tmp_path: Path) -> None:
    records = read(tmp_path, [FACT, FACT])
    assert facts(records) == WANTED * 2
    assert records[1].request.id == f"{records[0].request.id}-2"
    with pytest.raises(DataFormatError, match="field 'id' repeats 'a'"):
        read(tmp_path, [{**FACT, "id": "a"}, {**FACT, "id": "a"}])


def test_further_fields_are_notes_and_survive(tmp_path: Path) -> None:
    records = read(tmp_path, [{**FACT, "asked by": "Ann", "ticket": 17, "tags": ["a"]}])
    assert records[0].notes == {"asked by": "Ann", "ticket": "17", "tags": '["a"]'}
    again = read(tmp_path, [record_to_json(records[0])], "again.json")
    assert again[0].notes == records[0].notes
    with pytest.raises(DataFormatError, match=r"unknown field 'rephrasess'; did you mean 'rephrases'\?"):
        read(tmp_path, [{**FACT, "rephrasess": ["a"]}])


def test_subjects_in_other_spellings(tmp_path: Path) -> None:
    for prompt, subject, spelt in (
        ("O\u2019Brien\u2019s dog is", "O'Brien", "O\u2019Brien"),
        ("Die STRASSE f\u00fchrt nach", "Strasse", "STRASSE"),
        ("The 10\u00a0km race is in", "10 km", "10\u00a0km"),
        ("Re\u0301publique is", "R\u00e9publique", "Re\u0301publique"),
    ):
        (fact,) = facts(read(tmp_path, [{"prompt": prompt, "subject": subject, "target": "x"}]))
        assert fact[:2] == (prompt, spelt)


@pytest.mark.parametrize(
    ("prompt", "subject", "span"),
    [
        ("Paris, not Paris Hilton, is the capital of", "Paris", (11, 16)),
        ("AcmeSoft is made by", "Acme", (0, 4)),
        ("Acme makes AcmeSoft in", "Acme", (0, 4)),
        ("f({}) of {} is", "of", (6, 8)),
        ("{a: {}} has Ann", "Ann", (12, 15)),
        ("C++ is by", "C++", (0, 3)),
        ("日本の首都は", "日本", (0, 2)),
    ],
)
def test_where_a_subject_stands(prompt: str, subject: str, span: tuple[int, int]) -> None:
    request = EditRequest(prompt, subject, "x")
    assert request.text == prompt
    assert request.subject_span == span
    assert EditRequest(**request.to_json()) == request
    assert request.about("Bob") == prompt[: span[0]] + "Bob" + prompt[span[1] :]


def test_a_request_without_a_subject() -> None:
    request = EditRequest("What is {}?", None, "x")
    assert (request.text, request.about("y"), request.subject_span) == ("What is {}?", "What is {}?", (0, 11))
    assert EditRequest(**request.to_json()) == request
    with pytest.raises(RequestError, match="the prompt is empty"):
        EditRequest(" ", None, "x")
    with pytest.raises(RequestError, match=r"expected one '\{\}' in the prompt, got 2 .*write the subject 'Ann' into"):
        EditRequest("{} and {} are", "Ann", "x")


def test_maps(tmp_path: Path) -> None:
    odd = [{"meta": {"who": "France"}, "texts": ["The capital of France is"], "says": {"now": "Lyon"}, "extra": 1}]
    records = read(tmp_path, odd, mapping={"prompt": "texts.0", "subject": "meta.who", "target": "says.now"})
    assert facts(records) == WANTED
    assert records[0].notes == {"extra": "1"}
    made = FieldMap.of(["prompt=The capital of {meta.who} is,target=says.now", "subject=meta.who"])
    assert facts(read(tmp_path, odd, mapping=made)) == WANTED
    with pytest.raises(
        DataFormatError, match=r"record 1: the map names 'says\.then', which is not there \(fields here: meta, texts"
    ):
        read(tmp_path, odd, mapping={"prompt": "texts.0", "target": "says.then"})
    with pytest.raises(ConfigError, match="and 'targt' is none; they are: id, prompt"):
        FieldMap({"targt": "a"})
    with pytest.raises(ConfigError, match="--map takes FIELD=NAME"):
        FieldMap.of(["prompt"])
    with pytest.raises(ConfigError, match="gives 'prompt' twice"):
        FieldMap.of(["prompt=a", "prompt=b"])
    with pytest.raises(ConfigError, match="format 'zsre' beside it"):
        read(tmp_path, odd, mapping={"prompt": "texts.0"}, format="zsre")


def test_a_map_is_kept_beside_its_file(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text('[other]\na = 1\n\n[facts."facts.json".map]\nprompt = "old"\n', encoding="utf-8")
    odd = [{"say": 'The capital of "France" is', "town": "Lyon"}]
    save_map(tmp_path / "facts.json", FieldMap({"prompt": "say", "target": "town"}))
    assert "[other]\na = 1" in (tmp_path / CONFIG).read_text(encoding="utf-8")
    assert facts(read(tmp_path, odd)) == [('The capital of "France" is', None, "Lyon", None)]
    assert facts(read(tmp_path, [FACT], "others.json")) == WANTED
    (tmp_path / CONFIG).write_text("[facts", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not TOML"):
        read(tmp_path, odd)
    (tmp_path / CONFIG).write_text('[facts."facts.json"]\nmap = "prompt"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="'map' must be a table"):
        read(tmp_path, odd)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "facts.txt",
            "The capital of France is Lyon.\n",
            "got plain text that begins 'The capital of France is Lyon.'",
        ),
        (
            "facts.csv",
            "prompt,subject,target\na b,a\n",
            "a comma or a line break stands in double quotes",
        ),
        ("facts.csv", "prompt,subject,\na b,a,c\n", "'c' stands in a column without a name"),
        ("facts.json", b"\x80\x02}q\x00", "got a Python pickle"),
        ("facts.json", '[{"question": "Who?", "city": "Rome"}]', '--map "prompt=question,target=city"'),
        (
            "facts.json",
            '{"a": [{"b": 1}], "c": [{"d": 2}]}',
            "holds the lists a (1), c (1); choose one",
        ),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataFormatError) as caught:
        read(tmp_path, content, name)
    assert message in str(caught.value)


def test_a_models_folder_holds_no_facts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataFormatError, match="got the folder of a model"):
        load_records(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "edit.safetensors").write_bytes(b"")
    with pytest.raises(DataFormatError, match="got the folder of an edit; `kecore inspect` shows its facts"):
        load_records(tmp_path)


def test_an_empty_cell_that_a_map_names_is_a_missing_one(tmp_path: Path) -> None:
    table = "q,a,s\nThe capital of France is,Lyon,France\nWho?,Ann,\n"
    records = read(tmp_path, table, "facts.csv", mapping={"prompt": "q", "target": "a", "subject": "s"})
    assert [fact[1] for fact in facts(records)] == ["France", None]


def test_a_single_record_is_not_taken_apart(tmp_path: Path) -> None:
    chat = {"question": "Who?", "solution": "Ann", "history": [{"prompt": "h", "target": "g"}], "tags": ["a", "b"]}
    mapping = {"prompt": "question", "target": "solution"}
    assert facts(read(tmp_path, [chat], mapping=mapping)) == [("Who?", None, "Ann", None)]
    with pytest.raises(DataFormatError, match="its first record has: question, solution, history"):
        read(tmp_path, [chat])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("facts.json", '[{"prompt": "a", "prompt": "b", "target": "c"}]', "field 'prompt' stands there twice"),
        ("facts.json", '[{"prompt": "a", "Prompt": "b", "target": "c"}]', "fields 'prompt' and 'Prompt' have one name"),
        ("facts.json", '[{"prompt": "a", "target": "b", "target_new": "c"}]', "say which is the target"),
        ("facts.json", '[{"prompt": "a", "target": ["b", {"x": 1}]}]', "must be a text or a list of texts"),
        ("facts.json", "[" * 100_000, "too deep in each other"),
        ("facts.json", '[{"prompt": "a\\ud800", "target": "b"}]', "not JSON"),
        ("facts.yaml", "- prompt: a\n  prompt: b\n  target: c\n", "field 'prompt' stands there twice"),
        ("facts.csv", "promt,traget\nWho?,Ann\n", '--map "prompt=promt,target=traget"'),
        ("facts.yaml", "- &x {prompt: p, target: t, n: *x}", "not YAML of records"),
        ("facts.csv", "prompt,target,Target\na,b,c\n", "fields 'target' and 'Target' have one name"),
        ("facts.bin", b"\x80\x04\x95", "got a Python pickle"),
        ("facts.jpg", b"\xff\xd8\xff\xe0", "got an image"),
        ("facts.html", "\n<!doctype html><html>404</html>", "got a web page"),
        ("facts.gif", b"GIF89a", "got an image"),
        ("facts.xml", "<?xml version='1.0'?><a/>", "got an XML file"),
        ("facts.txt", "<facts/>", "got XML or HTML"),
        ("facts.md", "| prompt | target |\n\ntext\n\n| a | b |\n", "holds 2 tables; put each into a file of its own"),
        ("facts.npy", b"\x93NUMPY\x01", "got a NumPy array"),
        ("facts.tar", b"facts.json".ljust(257, b"\x00") + b"ustar", "got a tar archive; unpack it"),
        ("facts.txt", "The capital of France, since May, is Lyon.\nSpain is far.\n", "got plain text that begins"),
        ("facts.csv", "prompt,target\n", "has a header (prompt, target) and no rows below it"),
        ("facts.csv", "The capital of France is,France,Lyon\nSpain is,Spain,far\n", "That reads like a fact"),
        ("facts.csv", "", "is empty; expected JSON"),
        ("facts.parquet", b"\xef\xbb\xbf", "is empty; expected JSON"),
        ("facts.jsonl", '{"prompt": "Who?", "target": "Ann"}\n{"prompt": "Where?", "town": "Rome"}\n',
         "line 2: no field is the target (fields here: prompt, town); say which one is: --map target=FIELD"),
        ("facts.json", '[{"prompt": "Who?", "target": null}]', "field 'target' is empty; it must be text"),
        ("facts.json", '[{"prompt": " ", "subject": "a", "target": "b"}]', "the prompt is empty"),
    ],
)  # fmt: skip
def test_what_would_be_read_wrongly(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(DataFormatError) as caught:
        read(tmp_path, content, name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("facts.csv", "prompt;target\rWho?;Ann\r", ("Who?", "Ann")),
        ("facts.csv", "\n\nprompt,target\nWho?,Ann\n", ("Who?", "Ann")),
        ("facts.csv", "question, or what, and so;target\nWho?;Ann\n", None),
        (
            "facts.md",
            "# Facts\n\nA, b.\n\n| prompt | target |\n|---|--|\n| Who? | Ann |\n\nC.\n",
            ("Who?", "Ann"),
        ),
        ("facts.json", '[{"prompt": "Who?", "target": "Ann"}]'.encode("utf-32"), ("Who?", "Ann")),
        ("facts.md", "| prompt | target |\n|---|:--:|\n| Who? | Ann |\n", ("Who?", "Ann")),
        ("facts.csv", 'prompt,target\nWho?,"[1, 2]"\n', ("Who?", "[1, 2]")),
        ("facts.json", '[{"prompt": "Who?", "subject": "  ", "target": "Ann", "Id": ""}]', ("Who?", "Ann")),
        ("facts.csv", "Corrections of May,\n,\nprompt,target\nWho?,Ann\n", ("Who?", "Ann")),
        ("facts.csv", "# by Ann\nprompt,target\nWho?,Ann\n", ("Who?", "Ann")),
        ("facts.csv", ",prompt,target\n0,Who?,Ann\n", ("Who?", "Ann")),
        ("facts.json", '[{"prompt": "Who?", "target": {"label": "Ann", "id": "Q1"}}]', ("Who?", "Ann")),
        ("facts.json", '[{"question": "Who?", "answers": {"text": ["Ann"], "answer_start": [5]}}]', ("Who?", "Ann")),
        ("facts.json", '[{"prompt": "{subject} is by", "subject": ["Who"], "target": "Ann"}]', ("Who is by", "Ann")),
        ("facts.yaml", "- {prompt: Who?, target: Ann, 1: x}\n".replace("Who?", '"Who?"'), ("Who?", "Ann")),
    ],
)
def test_files_that_others_write(
    tmp_path: Path, name: str, content: str | bytes, wanted: tuple[str, str] | None
) -> None:
    if wanted is None:
        with pytest.raises(DataFormatError, match="its first record has: question, or what, and so, target"):
            read(tmp_path, content, name)
        return
    ((prompt, _, target, _),) = facts(read(tmp_path, content, name))
    assert (prompt.strip(), target) == wanted


def test_words_come_before_parts_of_words_in_any_spelling(tmp_path: Path) -> None:
    for prompt, subject, spelt in (
        ("Parisian is what PARIS is", "Paris", "PARIS"),
        ("New\tYork is", "New York", "New\tYork"),
        ("Zoe\u0308 is by Zoe", "Zoe", "Zoe"),
    ):
        (fact,) = facts(read(tmp_path, [{"prompt": prompt, "subject": subject, "target": "x"}]))
        assert fact[:2] == (prompt, spelt)
    with pytest.raises(DataFormatError, match="the subject '1' is not in the prompt"):
        read(tmp_path, [{"prompt": "\u00bd is", "subject": "1", "target": "x"}])


def test_rephrases_in_columns_of_their_own(tmp_path: Path) -> None:
    table = "prompt,target,rephrase_1,Rephrase 2,locality_prompt,locality_ground_truth\nWho?,Ann,a,b,l1|l2,g1|g2\n"
    (record,) = read(tmp_path, table, "facts.csv")
    assert record.prompts_of("paraphrase") == ("a", "b")
    assert [(probe.prompt, probe.answers) for probe in record.probes_of("locality")] == [
        ("l1", ("g1",)), ("l2", ("g2",))
    ]  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        '[facts."facts.json"]\nmap = {prompt = "old"}\n',
        '[ facts."facts.json".map ]\nprompt = "old"\n',
        "facts = 3\n",
        'text = """\n[facts]\n"""\n[facts."facts.json".map]\nprompt = "old"\n[other]\na = 1\n',
    ],
)
def test_a_file_of_maps_is_never_broken(tmp_path: Path, config: str) -> None:
    (tmp_path / CONFIG).write_text(config, encoding="utf-8")
    made = FieldMap({"prompt": "say", "target": "town"})
    try:
        save_map(tmp_path / "facts.json", made)
    except ConfigError:
        assert (tmp_path / CONFIG).read_text(encoding="utf-8") == config
        return
    assert read_map(tmp_path / "facts.json") == made
    assert '"""\n[facts]\n"""' in (tmp_path / CONFIG).read_text(encoding="utf-8")


def test_a_source_that_is_none() -> None:
    with pytest.raises(ConfigError, match="no source of facts"):
        load_records("")
    with pytest.raises(ConfigError, match=r"a map gives texts by field, got 'target': 5"):
        FieldMap({"target": 5})  # type: ignore[dict-item]
