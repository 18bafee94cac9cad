"""Random and hostile inputs: what is neither read nor refused in words is a defect.

    python benchmarks/fuzz.py edits --inputs 60000           # bytes and contents of edit files
    python benchmarks/fuzz.py facts --inputs 60000           # files of facts
    python benchmarks/fuzz.py ledgers --inputs 3000          # bytes of a ledger's database
    python benchmarks/fuzz.py http --inputs 60000            # bodies of all endpoints, by a client that knows no shame
    python benchmarks/fuzz.py schema --inputs 300            # schemathesis over the server's own OpenAPI (extra: fuzz)
    python benchmarks/fuzz.py atheris --inputs 200000        # coverage-guided, facts and edit files (extra: fuzz)

Each prints how many inputs were accepted and refused, and every kind of raw error with the line that raised it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kecore.api.errors import KecoreError
from kecore.api.identity import Fingerprint
from kecore.api.types import EditRequest
from kecore.edit import LowRank, WeightEdit, load_edit
from kecore.evaluate import load_records
from kecore.files import _digest, _header_digest

VALUES: list[Any] = [
    None, True, -1, 0, 2**63, 1e308, "", "x", "\x00", "\ud800", "\x1b[2J", "9" * 5000, [], {}, [[]], {"a": None},
    "😀" * 9,
]  # fmt: skip
SLOW = 20.0
"""Seconds beyond which an input hangs."""

Outcome = Callable[[random.Random], None]


def run(one: Outcome, inputs: int, seed: int, seconds: float) -> dict[str, Any]:
    """Try so many inputs, or as many as there is time for, and count what became of them."""
    end = time.perf_counter() + seconds
    counts: Counter[str] = Counter()
    raw: Counter[str] = Counter()
    slowest = 0.0
    for number in range(inputs):
        begin = time.perf_counter()
        if begin > end:
            inputs = number
            break
        try:
            one(random.Random(f"{seed} {number}"))
            counts["accepted"] += 1
        except KecoreError:
            counts["refused"] += 1
        except Exception as error:  # noqa: BLE001 - that is what is looked for
            counts["raw"] += 1
            frame = next(
                (f for f in reversed(traceback.extract_tb(error.__traceback__)) if "kecore" in f.filename), None
            )  # fmt: skip
            where = "" if frame is None else f"{Path(frame.filename).name}:{frame.lineno}"
            raw[f"{type(error).__name__} {where}: {str(error)[:80]}"] += 1
        slowest = max(slowest, time.perf_counter() - begin)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {
        "inputs": inputs, **counts, "kinds of raw errors": dict(raw.most_common(12)),
        "slowest (s)": round(slowest, 2), "hangs": int(slowest > SLOW), "peak memory (MiB)": peak,
    }  # fmt: skip


def damage(content: bytes, chance: random.Random) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    data = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        place = chance.randrange(len(data) + 1)
        match chance.randrange(4):
            case 0 if data:
                data[place % len(data)] ^= 1 << chance.randrange(8)
            case 1:
                del data[place : place + chance.randrange(1, 64)]
            case 2:
                data[place:place] = data[place : place + chance.randrange(1, 64)]
            case _:
                data[place:place] = chance.randbytes(chance.randrange(1, 16))
    return bytes(data)


def mutate(value: Any, chance: random.Random) -> Any:
    """Change a JSON value somewhere."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        match chance.randrange(6):
            case 0:
                return {name: item for name, item in value.items() if name != key}
            case 1:
                return {**value, chance.choice(["x", "", "__class__"]): chance.choice(VALUES)}
            case _:
                return {**value, key: mutate(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.8:
        index = chance.randrange(len(value))
        return [*value[:index], mutate(value[index], chance), *value[index + 1 :]]
    return chance.choice(VALUES)


def samples(folder: Path) -> list[Path]:
    """Edit files of all three kinds."""
    from kecore.editor import Editor
    from kecore.testing import tiny_model, tiny_tokenizer

    base = Fingerprint("float32", {"float32": "0" * 64})
    updates = {"a.weight": LowRank(torch.randn(3, 2), torch.randn(4, 2))}
    request = EditRequest("{} is in", "Paris", "Rome")
    paths = [
        WeightEdit(updates=updates, base=base, method="rome", requests=(request,)).save(folder / "weight.safetensors")
    ]
    editor = Editor(tiny_model("gpt2"), tiny_tokenizer(), progress=None)
    fact = EditRequest("The capital of France is", "France", "Rome")
    for method, config in {"grace": {"steps": 2}, "ike": {}, "in-context": {}, "wise": {"steps": 2}}.items():
        try:
            edit = editor.edit(fact, method, **config)
        except KecoreError as error:  # a method that needs more than this
            logging.getLogger(__name__).info("%s is left out: %s", method, error)
            continue
        paths.append(edit.save(folder / f"{method}.safetensors"))
        editor.revert()
    return paths


def edits(folder: Path) -> Outcome:
    """Edit files: damaged bytes, and whole files of changed content with the right digests."""
    files = [(path.read_bytes(), *_content(path)) for path in samples(folder)]
    target = folder / "tried.safetensors"

    def one(chance: random.Random) -> None:
        content, header, tensors = chance.choice(files)
        if chance.random() < 0.4:
            target.write_bytes(damage(content, chance))
        else:
            changed = header
            for _ in range(chance.choice([1, 1, 2])):
                changed = mutate(changed, chance) if isinstance(changed, dict) else changed
            if not isinstance(changed, dict):
                changed = {"kind": changed}
            changed = {"kind": header["kind"], **changed} if chance.random() < 0.9 else changed
            _write(target, changed, _change_tensors(tensors, chance))
        load_edit(target).inspect()

    return one


def _content(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {})["kecore"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    header.pop("header_digest", None)
    return header, tensors


def _change_tensors(tensors: dict[str, torch.Tensor], chance: random.Random) -> dict[str, torch.Tensor]:
    changed = dict(tensors)
    if not changed or chance.random() < 0.5:
        return changed
    name = chance.choice(list(changed))
    match chance.randrange(5):
        case 0:
            del changed[name]
        case 1:
            changed[name] = changed[name].flatten()
        case 2:
            changed[name] = torch.zeros(chance.choice([0, 1, 7]), chance.choice([0, 1, 7]))
        case 3:
            changed[name] = torch.zeros(3, 2, dtype=torch.int32)
        case _:
            changed[chance.choice(["x", "U/", "effect/x"])] = changed.pop(name)
    return changed or {"empty": torch.zeros(0)}


def _write(path: Path, header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    plain = {name: tensor for name, tensor in tensors.items() if name != "empty"}
    header = {**header, "digest": _digest(plain)}
    header["header_digest"] = _header_digest(header)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"kecore": json.dumps(header)})


FACTS: list[Any] = [
    {"prompt": "The capital of {} is", "subject": "France", "target": "Rome", "ground_truth": "Paris"},
    {"case_id": 1, "requested_rewrite": {"prompt": "{} is in", "subject": "Paris", "target_new": {"str": "Rome"},
     "target_true": {"str": "France"}}, "paraphrase_prompts": ["a"], "neighborhood_prompts": ["b"]},
    {"src": "Who?", "subject": "Who", "alt": "me", "answers": ["you"], "rephrase": "Who is it?",
     "loc": "nq question: x", "loc_ans": "y"},
]  # fmt: skip


def facts(folder: Path) -> Outcome:
    """Files of facts as JSON, JSON Lines and CSV: damaged bytes and changed values."""

    def one(chance: random.Random) -> None:
        record = chance.choice(FACTS)
        for _ in range(chance.choice([0, 1, 2])):
            record = mutate(record, chance) if isinstance(record, dict) else record
        kind = chance.choice(["json", "jsonl", "csv"])
        text = json.dumps([record] if kind == "json" else record) + "\n"
        if kind == "csv" and isinstance(record, dict):
            cells = [str(value) for value in record.values()]
            text = f"{','.join(map(str, record))}\n{','.join(cells)}\n"
        content = text.encode("utf-8", "surrogatepass")
        target = folder / f"tried.{kind}"
        target.write_bytes(damage(content, chance) if chance.random() < 0.5 else content)
        load_records(target)

    return one


def ledgers(folder: Path) -> Outcome:
    """The database of a ledger, damaged: what is read is what was written, or it is refused."""
    from kecore_serve.ledger import Ledger

    base = Fingerprint("float32", {"float32": "0" * 64})
    ledger = Ledger.create(folder / "ledger", "m", base)
    for number in range(3):
        updates = {"a.weight": LowRank(torch.randn(3, 1), torch.randn(4, 1))}
        request = EditRequest("{} is in", f"Place {number}", "Rome")
        ledger.append(WeightEdit(updates=updates, base=base, method="rome", requests=(request,)))
    ledger.tag("v1")
    ids = [entry.id for entry in ledger.active()]
    ledger.revert(ids[0])
    expected = [entry.to_json() for entry in ledger.entries()]
    ledger.close()
    database = folder / "ledger" / "ledger.sqlite"
    content = database.read_bytes()

    def one(chance: random.Random) -> None:
        for extra in ("-wal", "-shm"):
            Path(f"{database}{extra}").unlink(missing_ok=True)
        database.write_bytes(damage(content, chance))
        with Ledger.open(folder / "ledger") as opened:
            entries = [entry.to_json() for entry in opened.entries()]
            if entries != expected[: len(entries)]:
                raise RuntimeError("another history was read without a word")

    return one


def http(folder: Path) -> Outcome:
    """Bodies for all endpoints; an answer of 500, or one that is no JSON, is a raw error."""
    client, stop = _client(folder)
    bodies: dict[str, Any] = {
        "/v1/completions": {"model": "m", "prompt": ["The", "Rome"], "max_tokens": 2, "temperature": 1.0, "top_p": 0.9,
                            "n": 2, "stop": ["x"], "seed": 3, "stream": True, "logprobs": 2,
                            "stream_options": {"include_usage": True}},
        "/v1/chat/completions": {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2,
                                 "logprobs": True, "top_logprobs": 2, "response_format": {"type": "text"}},
        "/v1/edits": {"facts": [{"prompt": "Rome is in", "subject": "Rome", "target": "x"}], "method": "nothing",
                      "preset": "p", "config": {"steps": 1}, "note": "n"},
        "/v1/tags": {"name": ""}, "/v1/checkout": {"to": "nowhere"}, "/v1/edits/file": {"a": 1},
    }  # fmt: skip

    def one(chance: random.Random) -> None:
        path = chance.choice(list(bodies))
        body = bodies[path]
        for _ in range(chance.choice([1, 1, 2, 3])):
            body = mutate(body, chance) if isinstance(body, dict) else body
        content = json.dumps(body).encode()
        if chance.random() < 0.3:
            content = damage(content, chance)
        response = client.post(path, content=content, headers={"Content-Type": "application/json"})
        if response.status_code >= 500 or (response.status_code >= 400 and set(response.json()) != {"error"}):
            raise RuntimeError(f"{path} {response.status_code} {content[:200]!r} {response.text[:100]}")
        if response.status_code >= 400:
            raise KecoreError("refused")

    one.stop = stop  # type: ignore[attr-defined]
    return one


def _service(folder: Path) -> Any:
    from kecore.editor import Editor
    from kecore.testing import tiny_model, tiny_tokenizer
    from kecore_serve.server.live import LiveModel
    from kecore_serve.server.opening import make_service, open_ledger
    from kecore_serve.server.settings import Settings

    editor = Editor(tiny_model("llama"), tiny_tokenizer(), progress=None)
    opened = open_ledger(folder / "served", editor, "tiny")
    settings = Settings(name="m", token="x" * 32, max_tokens=4, body_bytes=100_000)
    return opened, lambda ledger: make_service(LiveModel(editor, ledger), settings)


def _client(folder: Path) -> tuple[Any, Callable[[], None]]:
    """A client of an application without a network between them, and what ends it."""
    from contextlib import ExitStack

    from starlette.testclient import TestClient

    from kecore_serve.server.app import make_app

    stack = ExitStack()
    opened, make = _service(folder)
    app = make_app(make(stack.enter_context(opened)))
    client = stack.enter_context(TestClient(app, headers={"Authorization": f"Bearer {'x' * 32}"}))
    return client, stack.close


def schema(folder: Path, inputs: int, seed: int) -> dict[str, Any]:
    """Run schemathesis over the server's own description of itself: statuses, content types and bodies hold."""
    import subprocess

    from kecore_serve.server.app import make_app
    from kecore_serve.server.running import running

    opened, make = _service(folder)
    with opened as ledger, running(make_app(make(ledger))) as url:
        command = [
            sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--header",
            f"Authorization: Bearer {'x' * 32}", "--max-examples", str(inputs), "--seed", str(seed), "--phases",
            "examples,coverage,fuzzing", "--checks",
            "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        ]  # fmt: skip
        done = subprocess.run(command, check=False, text=True, capture_output=True)
    return {"exit status": done.returncode, "end": done.stdout[-3000:].splitlines()}


def coverage_guided(folder: Path, inputs: int, seed: int) -> dict[str, Any]:
    """Run atheris over facts and edit files; it ends the process by itself, at the first raw error."""
    import atheris

    with atheris.instrument_imports(include=["kecore"]):
        from kecore.evaluate import formats, mapping, records  # noqa: F401 - to be followed
    path = samples(folder)[0].read_bytes()

    def one(data: bytes) -> None:
        kind = ("json", "jsonl", "csv", "safetensors")[data[0] % 4] if data else "json"
        target = folder / f"tried.{kind}"
        target.write_bytes(data[1:] if kind != "safetensors" else path[: len(path) - len(data)] + data)
        try:
            (load_edit if kind == "safetensors" else load_records)(target)
        except KecoreError:
            return

    corpus = folder / "corpus"
    corpus.mkdir()
    for number, record in enumerate(FACTS):
        (corpus / str(number)).write_bytes(bytes([number % 3]) + json.dumps(record).encode())
    atheris.Setup([sys.argv[0], f"-runs={inputs}", f"-seed={seed + 1}", "-rss_limit_mb=4096", str(corpus)], one)
    atheris.Fuzz()
    return {}


def main(what: str, inputs: int, seed: int, seconds: float) -> None:
    os.environ["KECORE_PLUGINS"] = ""
    logging.disable(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if what == "schema":
            figures = schema(folder, inputs, seed)
        elif what == "atheris":
            figures = coverage_guided(folder, inputs, seed)
        else:
            one = {"edits": edits, "facts": facts, "ledgers": ledgers, "http": http}[what](folder)
            try:
                figures = run(one, inputs, seed, seconds)
            finally:
                getattr(one, "stop", lambda: None)()
    print(json.dumps(figures, indent=2))  # noqa: T201


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["edits", "facts", "ledgers", "http", "schema", "atheris"])
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3600)
    main(**vars(parser.parse_args()))
