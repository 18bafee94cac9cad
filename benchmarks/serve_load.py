"""The server under many clients while it is edited, and what batching gives it.

    python benchmarks/serve_load.py demo --clients 64 --seconds 120
    python benchmarks/serve_load.py tiny --seconds 20

Clients ask for greedy texts as quickly as they are answered, half of them as streams, while edits are uploaded,
planned, reverted and checked out in between. Then every answer is compared with its oracle: the model with the edits of
the state that the answer names, asked for that prompt alone and without a cache. Before that, the same texts are asked
for one at a time and all at once: the ratio is what batching gives.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from kecore.api.types import EditRequest
from kecore.edit import LowRank, WeightEdit
from kecore.editor import Editor
from kecore_serve.server.app import make_app
from kecore_serve.server.live import LiveModel
from kecore_serve.server.opening import make_service, open_ledger
from kecore_serve.server.running import running
from kecore_serve.server.settings import Settings, make_token

SUBJECTS = ("France", "Italy", "The Danube", "Rome", "Vienna", "The Eiffel Tower", "Austria", "Danielle Darrieux")
PROMPTS = tuple(f"{begin}{subject} is" for subject in SUBJECTS for begin in ("", "The story of ", "They said that "))


@dataclass
class Load:
    """What a run did.

    Args:
        answers: how often each text came, by state and prompt.
        failures: what went wrong, in words.
        edits: changes of the edits, by kind.
        seconds: how long clients asked.
    """

    answers: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    edits: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def requests(self) -> int:
        return sum(counts.total() for counts in self.answers.values())


def random_edit(editor: Editor, number: int) -> WeightEdit:
    """An edit of random factors that changes what the model says and leaves it able to say something."""
    generator = torch.Generator().manual_seed(number)
    linear = editor.view.sites[number % len(editor.view.sites)].linear
    out, into = (torch.randn(size, 1, generator=generator) for size in linear.weight.shape)
    scale = 0.1 * float(linear.weight.detach().norm()) / float(out.norm() * into.norm())
    request = EditRequest("{} is in", f"Place {number}", f"Town {number}", id=f"fact-{number}")
    updates = {linear.name: LowRank(scale * out, into)}
    return WeightEdit(updates=updates, base=editor.base, method="random", requests=(request,))


async def ask(client: httpx.AsyncClient, load: Load, prompt: str, tokens: int, *, stream: bool) -> None:
    """Ask once, and keep what came."""
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream}
    response = await client.post("/v1/completions", json=body)
    if response.status_code != 200:
        load.failures.append(f"{response.status_code}: {response.text[:200]}")
        return
    if not stream:
        values = [response.json()]
    else:
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        if lines.pop() != "[DONE]":
            load.failures.append("a stream did not end")
            return
        values = [json.loads(line) for line in lines]
    if any("error" in value for value in values):
        load.failures.append(str(values[-1])[:200])
        return
    states = {value["system_fingerprint"] for value in values} | {response.headers["X-Kecore-State"]}
    if len(states) > 1:
        load.failures.append(f"an answer of the states {states}")
        return
    text = "".join(value["choices"][0]["text"] for value in values)
    load.answers.setdefault((states.pop(), prompt), Counter())[text] += 1


async def client_loop(client: httpx.AsyncClient, load: Load, number: int, until: float, tokens: int) -> None:
    chance = random.Random(number)
    while time.perf_counter() < until:
        await ask(client, load, chance.choice(PROMPTS), tokens, stream=chance.random() < 0.5)


async def change(client: httpx.AsyncClient, load: Load, files: list[bytes], until: float, pause: float) -> None:
    """Change the edits again and again: upload, plan, revert any of them, go back to a tag."""
    chance = random.Random(1)
    await client.post("/v1/tags", json={"name": "start"})
    active: list[str] = []
    while time.perf_counter() < until:
        await asyncio.sleep(pause)
        kind = chance.choice(["upload"] * 4 + ["revert"] * 3 + ["plan", "checkout"])
        if kind == "upload" and files:
            response = await client.post("/v1/edits/file", content=files.pop())
            active.append(response.json().get("id", ""))
        elif kind == "plan":
            # A subject of its own: edits that contradict each other are refused, which is no failure.
            subject = f"Town {chance.randrange(10**6)}"
            fact = {"prompt": f"{subject} is in", "subject": subject, "target": "Rome"}
            body = {"facts": [fact], "method": "ft-l", "config": {"steps": 2}}
            response = await client.post("/v1/edits", json=body)
            active.append(response.json().get("id", ""))
        elif kind == "checkout" and chance.random() < 0.3:
            response = await client.post("/v1/checkout", json={"to": "start"})
            active.clear()
        elif active:
            kind = "revert"
            response = await client.delete(f"/v1/edits/{active.pop(chance.randrange(len(active)))}")
        else:
            continue
        load.edits[kind] += 1
        if response.status_code >= 300:
            load.failures.append(f"{kind}: {response.status_code}: {response.text[:200]}")


async def run_load(
    url: str, token: str, files: list[bytes], *, clients: int, seconds: float, tokens: int, pause: float
) -> Load:
    """Let clients ask and edits come for so many seconds."""
    load = Load()
    limits = httpx.Limits(max_connections=clients + 8)
    headers = {"Authorization": f"Bearer {token}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=300) as client:
        begin = time.perf_counter()
        loops = [client_loop(client, load, number, begin + seconds, tokens) for number in range(clients)]
        await asyncio.gather(*loops, change(client, load, files, begin + seconds, pause))
        load.seconds = time.perf_counter() - begin
    return load


async def measure_throughput(url: str, prompts: list[str], tokens: int) -> tuple[float, float]:
    """Return seconds for these prompts one after the other, and all at once."""
    async with httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=100), timeout=600) as client:
        load = Load()
        await ask(client, load, prompts[0], tokens, stream=False)  # once, so that nothing is new
        begin = time.perf_counter()
        for prompt in prompts:
            await ask(client, load, prompt, tokens, stream=False)
        alone = time.perf_counter() - begin
        begin = time.perf_counter()
        await asyncio.gather(*(ask(client, load, prompt, tokens, stream=False) for prompt in prompts))
        together = time.perf_counter() - begin
    if load.failures or any(len(counts) > 1 for counts in load.answers.values()):
        raise SystemExit(f"texts asked for together are not those asked for alone: {load.failures[:3]}")
    return alone, together


def count_foreign(live: LiveModel, load: Load, tokens: int) -> tuple[int, list[str]]:
    """Return how many answers are not what the state that they name says, and examples."""
    foreign, examples = 0, []
    for state in sorted({state for state, _ in load.answers}):
        live.checkout(state)
        for (of_state, prompt), counts in load.answers.items():
            if of_state != state:
                continue
            expected = greedy_text(live, prompt, tokens)
            for text, count in counts.items():
                if text != expected:
                    foreign += count
                    examples.append(f"{state} {prompt!r}: {text!r} instead of {expected!r}")
    return foreign, examples


@torch.no_grad()
def greedy_text(live: LiveModel, prompt: str, tokens: int) -> str:
    """Write a text by the model's own forward passes over all tokens, one prompt at a time."""
    tokenizer, model = live.encoder.tokenizer, live.view.model
    ids = list(live.encoder.encode(prompt).ids)
    written: list[int] = []
    with live.view.frozen():
        while len(written) < tokens and tokenizer.eos_token_id not in written:
            row = torch.tensor([ids + written], device=live.view.device)
            written.append(int(model(input_ids=row, use_cache=False).logits[0, -1].argmax()))
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return tokenizer.decode(ids + written, **options)[len(tokenizer.decode(ids, **options)) :]


def open_editor(model: str) -> Editor:
    if model != "tiny":
        return Editor.from_pretrained(model, progress=None)
    from kecore.testing import tiny_model, tiny_tokenizer

    return Editor(tiny_model("llama"), tiny_tokenizer(), progress=None)


def main(model: str, clients: int, seconds: float, tokens: int, pause: float) -> dict[str, Any]:
    """Run it all, and return the figures."""
    editor = open_editor(model)
    with tempfile.TemporaryDirectory() as folder, open_ledger(None, editor, model) as ledger:
        path = Path(folder) / "edit.safetensors"
        files = [random_edit(editor, number).save(path).read_bytes() for number in range(200)]
        token = make_token()
        live = LiveModel(editor, ledger)
        service = make_service(live, Settings(name="m", token=token))
        with running(make_app(service)) as url:
            prompts = [PROMPTS[index % len(PROMPTS)] + " " * (index // len(PROMPTS)) for index in range(clients)]
            alone, together = asyncio.run(measure_throughput(url, prompts, tokens))
            load = asyncio.run(
                run_load(url, token, files, clients=clients, seconds=seconds, tokens=tokens, pause=pause)
            )  # fmt: skip
        foreign, examples = count_foreign(live, load, tokens)
    return {
        "requests": load.requests,
        "seconds": round(load.seconds, 1),
        "failures": load.failures[:5],
        "edits": dict(load.edits),
        "states": len({state for state, _ in load.answers}),
        "answers of another state": foreign,
        "examples": examples[:5],
        "tokens a second, one at a time": round(len(prompts) * tokens / alone, 1),
        "tokens a second, together": round(len(prompts) * tokens / together, 1),
        "ratio": round(alone / together, 2),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model's reference, or 'tiny' for one of random weights")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two changes of the edits")
    arguments = parser.parse_args()
    print(json.dumps(main(**vars(arguments)), indent=2))  # noqa: T201
