"""Where records come from: tables, folders, splits, checksums, the hub, and what is said of bad input."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import published
import pytest
from make_records import axes

from kecore.api.errors import ConfigError, DataFormatError, HubError, KecoreWarning, MissingDependencyError
from kecore.evaluate import load_records


def write(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(records)), encoding="utf-8")
    return path


def fact(place: int) -> dict[str, Any]:
    return {"id": f"f{place}", "prompt": "{} is in", "subject": f"City {place}", "target": "Asia"}


def test_tables_are_own_records_too(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(
        "id,prompt,subject,target,rephrases,locality\n"
        'a,"Where is {}?",Rome,"Gaul, north","[""One?"", ""Two?""]",\n'
        ',Is Ann in,Ann,Rome,Where is Ann?,"{""far"": [{""prompt"": ""2+2="", ""answers"": [""4""]}]}"\n'
        "\n",
        encoding="utf-8",
    )
    one, two = load_records(path)
    assert (one.request.id, one.request.target) == ("a", "Gaul, north")
    assert one.prompts_of("paraphrase") == ("One?", "Two?")
    assert axes(one, "locality") == {}
    assert one.source == "kecore: facts.csv record 1"
    assert len(two.request.id) == 12
    assert two.prompts_of("paraphrase") == ("Where is Ann?",)
    assert two.probes_of("locality")[0].answers == ("4",)
    packed = tmp_path / "facts.tsv.gz"
    packed.write_bytes(gzip.compress(b"prompt\tsubject\ttarget\n{} is\tRome\tin Gaul\n"))
    assert load_records(packed)[0].request.target == "in Gaul"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; expected JSON"),
        ("prompt,subject,target\na b,a\n", "record 1: expected 3 cells as in the header, got 2"),
        ("prompt,subject,subject\na,b,c\n", "names the column 'subject' twice"),
        ('prompt,subject,target\n"a" b,c,d\n', "line 2: not a table"),
        ("prompt,subject,target\n", r"has a header \(prompt, subject, target\) and no rows"),
    ],
)
def test_broken_tables(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "facts.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataFormatError, match=message):
        load_records(path)


def test_a_folder_of_one_layout_and_its_splits(tmp_path: Path) -> None:
    write(tmp_path / "zsre_train.json", {**published.ZSRE, "case_id": 1})
    write(tmp_path / "deep" / "zsre-dev.json", {**published.ZSRE, "case_id": 2})
    write(tmp_path / "zsre_eval.json", {**published.ZSRE, "case_id": 3}, {**published.ZSRE, "case_id": 3})
    (tmp_path / "README.md").write_text("not read")
    with pytest.raises(DataFormatError, match="holds the splits eval, train, validation; choose one by --split NAME"):
        load_records(tmp_path)
    assert [r.request.id for r in load_records(tmp_path, split="train")] == ["1"]
    found = load_records(tmp_path, split="VAL")
    assert (found[0].source, found.split) == ("zsre: deep/zsre-dev.json record 1", "VAL")
    twice = load_records(tmp_path, split="eval")
    assert [r.request.id for r in twice] == ["3", "3-2"]
    ((where, reason),) = twice.renamed
    assert where == "zsre_eval.json record 2"
    assert "id '3' stands on zsre_eval.json record 1; called '3-2' here" in reason
    with pytest.raises(ConfigError, match="no split 'test'; its splits: eval, train, validation"):
        load_records(tmp_path, split="test")
    with pytest.raises(ConfigError, match="split 'train' was asked of the single file"):
        load_records(tmp_path / "zsre_train.json", split="train")


def test_a_folder_that_mixes_layouts(tmp_path: Path) -> None:
    write(tmp_path / "a.json", published.ZSRE)
    write(tmp_path / "b.json", published.KNOWEDIT)
    write(tmp_path / "c.json", {"sentence": "a", "label": 1})
    with pytest.raises(DataFormatError, match=r"mixes layouts \(zsre: a.json; knowedit: b.json\); choose one by"):
        load_records(tmp_path)
    with pytest.warns(KecoreWarning, match="2 of 3 files and 0 of 1 records"):
        found = load_records(tmp_path, format="knowedit")
    assert [item.reason for item in found.skipped] == ["a.json: of the layout 'zsre'", "c.json: unknown layout"]
    with pytest.raises(DataFormatError, match="no file of this folder is of a known layout"):
        load_records(tmp_path, format="unke")


def test_a_file_that_mixes_layouts_says_which(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.json", published.ZSRE, published.UNKE)
    # Of a tie the more specific layout is taken for that of the file.
    message = r"facts\.json record 1: this record is of the layout 'zsre', the first ones are mostly of 'unke'"
    with pytest.raises(DataFormatError, match=message):
        load_records(path)
    for options in ({"skip_errors": True}, {"format": "unke"}):
        with pytest.warns(KecoreWarning, match="1 of 2 records"):
            found = load_records(path, **options)
        assert (found.format, found[0].request.id) == ("unke", "0")
        assert found.skipped[0].reason.endswith("(this record is of the layout 'zsre')")


@pytest.mark.parametrize("place", [1, 3, 90])
def test_one_foreign_line_does_not_throw_the_others_away(tmp_path: Path, place: int) -> None:
    facts = [fact(i) for i in range(99)]
    path = write(tmp_path / "facts.json", *facts[:place], published.ZSRE, *facts[place:])
    message = rf"facts\.json record {place + 1}: this record is of the layout 'zsre', .* mostly of 'kecore'"
    with pytest.raises(DataFormatError, match=message):
        load_records(path)
    with pytest.warns(KecoreWarning, match="1 of 100 records"):
        found = load_records(path, skip_errors=True)
    assert (found.format, len(found)) == ("kecore", 99)


@pytest.mark.parametrize("place", [1, 3, 90])
def test_a_line_that_our_own_layout_explains_is_no_foreign_one(tmp_path: Path, place: int) -> None:
    facts = [fact(i) for i in range(99)]
    found = load_records(write(tmp_path / "facts.json", *facts[:place], published.EASYEDIT, *facts[place:]))
    assert (found.format, len(found)) == ("kecore", 100)
    assert [probe.kind for probe in found[place].probes] == ["edit", "paraphrase", "locality"]


def test_a_file_of_which_less_than_half_can_be_read_is_refused(tmp_path: Path) -> None:
    odd = {**published.ZSRE, "subject": "the Rhine"}
    path = write(tmp_path / "facts.json", published.ZSRE, odd, {**odd, "case_id": 2})
    message = r"2 of 3 records of facts\.json cannot be read as the layout 'zsre'; the first: .*'the Rhine' is not in"
    for options in ({}, {"format": "zsre"}):
        with pytest.raises(DataFormatError, match=message):
            load_records(path, **options)
    with pytest.warns(KecoreWarning, match="2 of 3 records"):
        assert len(load_records(path, skip_errors=True)) == 1
    with pytest.warns(KecoreWarning, match="1 of 2 records"):
        assert len(load_records(path, limit=2)) == 1


def test_checksums(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.json", fact(1), fact(2))
    packed = tmp_path / "facts.json.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    found = load_records(path, sha256=digest.upper())
    assert found.sha256 == digest
    # Of a packed file both digests count; the records' own is the same for either.
    again = load_records(packed, sha256=digest[:12])
    assert again.sha256 == hashlib.sha256(packed.read_bytes()).hexdigest() != digest
    assert load_records(packed, sha256=again.sha256).content_sha256 == found.content_sha256
    assert load_records(path, limit=1).content_sha256 != found.content_sha256
    with pytest.raises(DataFormatError, match=f"expected SHA-256 {'0' * 64}, got {digest}"):
        load_records(path, sha256="0" * 64)
    for bad in ("abc", "x" * 64):
        with pytest.raises(ConfigError, match="at least 12 hex digits"):
            load_records(path, sha256=bad)
    whole = load_records(write(tmp_path / "folder" / "a.json", fact(1)).parent)
    write(tmp_path / "folder" / "b.json", fact(2))
    both = load_records(tmp_path / "folder")
    assert len({whole.sha256, both.sha256, digest}) == 3
    assert both.content_sha256 == found.content_sha256
    assert both.to_json()["edits"] == 2


def test_a_list_of_checksums_beside_or_above_the_data(tmp_path: Path) -> None:
    path = write(tmp_path / "data" / "sets" / "facts.json", fact(1))
    right, wrong = hashlib.sha256(path.read_bytes()).hexdigest(), "0" * 64
    above, beside = tmp_path / "data" / "SHA256SUMS", path.with_name("SHA256SUMS")
    above.write_text(f"# all\n{wrong}  facts.json\n{right}  sets/facts.json\n")
    assert len(load_records(path)) == len(load_records(path.parent)) == 1
    above.write_text(f"{wrong} *./sets/facts.json\n")
    for source in (path, path.parent, tmp_path):
        with pytest.raises(DataFormatError, match=rf"facts\.json: expected SHA-256 {wrong} as .*SHA256SUMS lists, got"):
            load_records(source)
    beside.write_text(f"{wrong}  other.json\n")  # does not name it, so the one above counts
    with pytest.raises(DataFormatError, match=wrong):
        load_records(path)
    beside.write_text(f"{right.upper()}  facts.json\n")
    assert load_records(path).sha256 == right
    packed = path.with_name("facts.json.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    beside.write_text(f"{right}  facts.json.gz\n")  # a list is of files as they are stored
    with pytest.raises(DataFormatError, match="changed or cut short"):
        load_records(packed)


@pytest.mark.parametrize("id", [1.5, True, ["a"]])
def test_an_id_that_is_none_is_an_error(tmp_path: Path, id: Any) -> None:
    path = write(tmp_path / "facts.json", {**fact(1), "id": id}, fact(2))
    with pytest.raises(DataFormatError, match="record 1: field 'id' must be a text or a number that is not empty"):
        load_records(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"long_form": "yes"}, "'long_form' must be true or false"),
        ({"joint": [{"prompt": "{} is", "subject": "Rome"}]}, r"'joint'\[0\]: field 'target' is missing"),
        ({"joint": [{**fact(1), "rephrases": []}]}, "unknown field 'rephrases'"),
        ({"multi_hop": [{"questions": [], "answers": "x"}]}, "'questions' must be a list of texts that is not empty"),
        ({"multi_hop": [{"questions": ["a?"]}]}, "field 'answers' is missing"),
        ({"portability": {"x": [{"prompt": "p", "need": "most"}]}}, "'need' must be 'any' or 'all'"),
        ({"portability": {"x": [{"prompt": "p", "also": "a"}]}}, "'also' must be a list of lists"),
        ({"portability": {"x": [{"prompt": "p", "hint": "a"}]}}, "unknown field 'hint'"),
        ({"locality": {"x": [{"prompt": " "}]}}, "'prompt' must be text that is not empty"),
    ],
)
def test_own_layout_checks_every_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataFormatError, match=message):
        load_records(write(tmp_path / "facts.json", {**fact(1), **change}))


class Hub(ModuleType):
    """Stands in for the datasets library."""

    class exceptions:
        class DatasetsError(Exception):
            pass

    def __init__(self, found: Any) -> None:
        super().__init__("datasets")
        self.found, self.asked = found, []

    def load_dataset(self, *arguments: Any, **options: Any) -> Any:
        self.asked.append((arguments, options))
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_hub_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    # Arrow fills what a row lacks with nulls, also axes that other rows have.
    row = {**published.KNOWEDIT, "cond": None}
    row["locality"] = {**row["locality"], "Forgetfulness": None}
    hub = Hub({"test": [row]})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    found = load_records("hf:zjunlp/KnowEdit:recent")
    assert hub.asked == [(("zjunlp/KnowEdit", "recent"), {"split": None, "revision": None})]
    assert (found.format, str(found.path), found[0].source) == (
        "knowedit", "hf:zjunlp/KnowEdit:recent", "knowedit: hf:zjunlp/KnowEdit row 1",
    )  # fmt: skip
    assert set(axes(found[0], "locality")) == {"Relation_Specificity"}
    assert load_records("hf:zjunlp/KnowEdit", sha256=found.sha256).sha256 == found.sha256
    hub.found = [row]
    assert len(load_records("hf:zjunlp/KnowEdit", split="test")) == 1
    for revision in ("v1.0", "refs/convert/parquet"):
        (record,) = load_records(f"hf:zjunlp/KnowEdit@{revision}:recent", split="test")
        assert hub.asked[-1] == (("zjunlp/KnowEdit", "recent"), {"split": "test", "revision": revision})
        assert record.source == f"knowedit: hf:zjunlp/KnowEdit@{revision} row 1"
    hub.found = {"train": [row], "test": [row]}
    with pytest.raises(ConfigError, match="has the splits train, test; choose one by --split NAME"):
        load_records("hf:zjunlp/KnowEdit")
    for refusal in (
        ConnectionError("Couldn't reach the Hub"),
        ValueError("Unknown split"),
        hub.exceptions.DatasetsError(),
    ):
        hub.found = refusal
        with pytest.raises(HubError, match=rf"hf:a/b cannot be had .*{type(refusal).__name__}: {refusal}"):
            load_records("hf:a/b")


def test_rows_of_the_hubs_library_are_the_records_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that have been through Arrow, which gives every row all fields of all rows, as nulls."""
    datasets = pytest.importorskip("datasets", reason="needs the datasets library (the extra 'data')")
    mquake, knowedit, safe = published.MQUAKE_REMASTERED, published.KNOWEDIT, published.SAFEEDIT
    forgets = {"Forgetfulness": [{"prompt": "Its river is", "ground_truth": ["Seine"]}]}
    plain = {name: knowedit[name] for name in ("prompt", "subject", "target_new", "portability")}
    tests = {name: text for name, text in safe["generalization test"].items() if "questions and" not in name}
    sets = {
        "mquake": [
            {**mquake, "split": {"100": ["edited"], "3000": ["edited"]}},
            {**mquake, "case_id": 9, "split": {"100": ["unedited"]}, "answer_alias": []},
        ],
        "knowedit": [
            knowedit, {**knowedit, "locality": forgets, "subject": "Capital", "rephrase_prompt": None},
            {**plain, "target_new": "Po", "portability": {}, "locality": {}},
        ],
        "safeedit": [safe, {**safe, "id": 3, "generalization test": tests, "unsafety category": None}],
    }  # fmt: skip
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for name, rows in sets.items():
        table = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
        assert list(table["test"]) != rows  # nulls came in
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, table=table, **__: table)
        found = load_records(f"hf:someone/{name}")
        files = load_records(write(tmp_path / f"{name}.json", *rows))
        assert (found.format, found.skipped, len(found)) == (name, (), len(rows))
        assert found.content_sha256 == files.content_sha256
        if name == "mquake":
            edited = [load_records(source, variant="edited-100") for source in (f"hf:someone/{name}", files.path)]
            assert edited[0].content_sha256 == edited[1].content_sha256


def test_hub_files_and_their_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(repository: str, file: str, repo_type: str, revision: str | None, local_dir: None) -> str:
        asked.append((repository, file, repo_type, revision))
        return str(write(tmp_path / "cache" / "facts.json", published.ZSRE))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = load_records("hf:zjunlp/KnowEdit/benchmark/facts.json")
    load_records("hf:zjunlp/KnowEdit@refs/pr/2/benchmark/facts.json")
    rest = ("zjunlp/KnowEdit", "benchmark/facts.json", "dataset")
    assert asked == [(*rest, None), (*rest, "refs/pr/2")]
    assert (found.format, found[0].source) == ("zsre", "zsre: benchmark/facts.json record 1")
    with pytest.raises(ConfigError, match="split 'test' was asked of the single file hf:zjunlp/KnowEdit/x"):
        load_records("hf:zjunlp/KnowEdit/x.json", split="test")
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"hf:nobody/nothing/x.json cannot be had from the Hugging Face hub"):
        load_records("hf:nobody/nothing/x.json")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'kecore\[data\]'"):
        load_records("hf:nobody/nothing")
    for bad in ("counterfact", "a/b@", "a/b@x@y"):
        with pytest.raises(ConfigError, match=r"expected hf:OWNER/NAME\[@REVISION\]"):
            load_records(f"hf:{bad}")


def test_hub_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def download(repository: str, repo_type: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, repo_type, revision, allow_patterns))
        write(tmp_path / "benchmark" / "zsre" / "zsre_train.json", {**published.ZSRE, "case_id": 1})
        write(tmp_path / "benchmark" / "zsre" / "zsre_test.json", {**published.ZSRE, "case_id": 2})
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for reference in ("hf:a/b/benchmark/zsre", "hf:a/b/benchmark/zsre/"):
        (record,) = load_records(reference, split="test")
        assert (record.request.id, record.source) == ("2", "zsre: zsre_test.json record 1")
    load_records("hf:a/b@v1/benchmark/zsre", split="train")
    folder = ["benchmark/zsre/*"]
    assert asked == [("a/b", "dataset", None, folder)] * 2 + [("a/b", "dataset", "v1", folder)]
    both = load_records("hf:a/b/benchmark/zsre", split="train+test")
    assert [record.request.id for record in both] == ["2", "1"]
    with pytest.raises(ConfigError, match="no split 'dev'; its splits: test, train"):
        load_records("hf:a/b/benchmark/zsre", split="train+dev")
    with pytest.raises(HubError, match="hf:a/b has no folder 'benchmark/other'"):
        load_records("hf:a/b/benchmark/other")
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"hf:nobody/nothing/some/folder cannot be had from the Hugging Face hub"):
        load_records("hf:nobody/nothing/some/folder")


def test_layouts_without_variants_refuse_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the layout 'zsre' has no variants, got 'text'"):
        load_records(write(tmp_path / "facts.json", published.ZSRE), variant="text")
