"""Writes docs/cli.md from the commands themselves.

Run ``python docs/_cli.py``. A test compares the page with what the script would write.
"""

from __future__ import annotations

import inspect
import textwrap
from pathlib import Path
from typing import Any

import typer.main

from kecore.cli import app

PAGE = Path(__file__).with_name("cli.md")

_TEXT = """\
# The command line

Written by `python docs/_cli.py` from the commands themselves; `kecore COMMAND --help` shows the same.
`docs/quickstart.md` shows them at work.

| command | what it does |
| --- | --- |
{summary}

## What holds for every command

**Output.** The result goes to stdout, everything else (progress bars, notices, warnings, errors) to stderr. With
`--json`, stdout carries exactly one JSON object, also when something goes wrong:
`{{"error": {{"type": ..., "message": ...}}}}`. Scores that could not be taken are `null`, never 0.

**Errors** are one line on stderr, with the error's class; `kecore explain CLASS` says what it means and what to do (the
pages of `docs/errors/`). `KECORE_DEBUG=1` brings the traceback as well.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | the work failed, or something that was to be proven does not hold |
| 2 | the input is at fault: a wrong option, file, model, method or fact |
| 130 | interrupted with Ctrl-C |

Input is checked before a model is loaded where that is possible. Files and checkpoints appear whole or not at all.

**MODEL** is a Hub id, a directory with a Hugging Face checkpoint, a `.gguf` file, or `demo`
(`docs/install.md`). No command changes it.

**Key statistics.** Methods that need them (`kecore methods` says which) take them from `--stats`, or collect them from
`--text`, or from a small Wikipedia sample that kecore ships. Collected ones are kept in the cache (`KECORE_CACHE`)
under a digest of weights, text, layers, number of tokens and seed, so that the next run on the same model is quick and
another model never sees them. The sample is enough for a try; for numbers that you report, collect them from more text.

**Memory.** `--memory 4GiB` is the most that the whole process may hold at one time in main memory, or on the GPU if the
model is there: program, weights and everything that the work adds. Before they begin, `kecore edit` and `kecore stats`
print what each stage is expected to take, how large its micro-batches are, and what is mapped from disk instead of
being read (key statistics, their factors, which are kept in the cache by content). The expectation is worked out from
shapes. A budget that cannot hold the model, or the smallest micro-batch, is refused at once with what is needed. With
`auto`, three quarters of what is free are used.

**Threads.** `kecore` asks OpenMP's threads to wait without spinning (`OMP_WAIT_POLICY=PASSIVE`, unless it is set).
Where other programs want the same cores, spinning threads starve each other: an evaluation that takes 8 seconds this
way took 80 to 260 without.

{commands}
## The result of `kecore edit`

`--out` holds `edit.safetensors` and `result.json`. The latter is what `--json` prints, and `records` with the
scores and answers of each. The fields that programs read first:

| field | meaning |
| --- | --- |
| `method`, `n` | the method, and the number of facts |
| `scores_before`, `scores` | score by metric before and after; null with `--no-evaluate` |
| `details` | the same with the ends of the 95 % interval (`low`, `high`), and numbers of records and probes |
| `samples` | what the model writes before and after |
| `stages` | seconds by stage: those of the command and, in the place of the edit, those of the method |
| `edit_seconds`, `total_seconds` | seconds of planning and attaching; of the whole command until the result |
| `memory_plan` | the budget, and by stage what was expected: parts, tokens of a micro-batch, peak |
| `peak_memory_bytes` | the most that was held at one time, on the accelerator if there is one |
| `edit_path`, `result_path` | the files |
| `protocol` | how scores were taken, with its `hash`: numbers with different hashes do not belong in one table |
| `config`, `preset`, `seed`, `form`, `statistics` | what the edit depends on; `form` says whether with chat template |
| `base`, `model`, `dtype`, `device`, `versions`, `hardware` | what it was made on |
| `warnings` | what was warned of |

## What `kecore attach` writes

A complete checkpoint that any program for Hugging Face checkpoints loads. A folder `kecore/` in it, which such programs
do not look at, holds the edits, the original data of the matrices that they change, and `attached.json` with
fingerprints. `kecore revert` puts the original data back and proves by the fingerprint of all weights that the base is
there bit for bit; it refuses a checkpoint whose weights were changed since. `kecore chat` compares such a checkpoint
with its base, and `kecore attach` adds further edits to it. In Python, `Editor.save_checkpoint` writes one, and
`attach_edits` and `take_off_edits` of `kecore.checkpoint` do what the two commands do (docs/quickstart.md).

"""

_OWN = '''\
## A command of your own

Commands that are not of the core stand behind the entry-point group `kecore.commands`; those of kecore's own plugins do
(`setup.py`), and so can yours. In your package:

```python
import typer

from kecore.cli import options
from kecore.cli.console import Screen


def greet(context: typer.Context, name: str, as_json: options.AsJson = False) -> None:
    """Greet somebody."""
    screen = Screen.of(context)
    screen.show(f"Hello {name}")
    screen.finish({"greeted": name})  # what --json prints
```

```toml
[project.entry-points."kecore.commands"]
greet = "your_package.commands:greet"
```

The object is a function that typer can make a command of, or a `typer.Typer` with several commands, which then follow
the name. `kecore --help` imports every command: import torch and what needs it inside the function. One that cannot be
imported, or takes the name of a command of kecore, is left out and named on stderr; `kecore doctor` says why, and all
others work. `KECORE_PLUGINS` and `KECORE_STRICT_PLUGINS` (`docs/install.md`) hold for commands as for methods.
'''


def page() -> str:
    """Return the whole page."""
    group: Any = typer.main.get_command(app)
    commands = {name: group.get_command(None, name) for name in group.list_commands(None)}
    summary = [f"| `kecore {name}` | {_first(command)} |" for name, command in commands.items()]
    sections = [_section(name, command) for name, command in commands.items()]
    return _TEXT.format(summary="\n".join(summary), commands="\n".join(sections)) + _OWN


def _help(command: Any) -> str:
    return inspect.cleandoc(command.help or "")


def _first(command: Any) -> str:
    return _help(command).partition("\n")[0]


def _section(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and "--help" not in p.opts]
    paragraphs = [" ".join(text.split()) for text in _help(command).split("\n\n")]
    required = " ".join(f"{p.opts[0]} {p.metavar}" for p in options if p.required)
    usage = " ".join(filter(None, [f"kecore {name}", *map(_argument, arguments), required, "[OPTIONS]"]))
    rows = [f"| `{_argument(p)}` | {_text(p)} |  |" for p in arguments]
    rows += [f"| `{_names(p)}` | {_text(p)} | {_default(p)} |" for p in options]
    lines = [f"### kecore {name}", "", f"`{usage}`", ""]
    for paragraph in paragraphs:
        lines += [textwrap.fill(paragraph, 118), ""]
    return "\n".join([*lines, "| option | meaning | default |", "| --- | --- | --- |", *rows, ""])


def _argument(parameter: Any) -> str:
    return f"{parameter.metavar}{'...' if parameter.nargs == -1 else ''}"


def _names(parameter: Any) -> str:
    return f"{parameter.opts[0]} {parameter.metavar}" if parameter.metavar else parameter.opts[0]


def _text(parameter: Any) -> str:
    """Return a parameter's help as Markdown in a cell of a table; brackets side by side would be a link."""
    return (parameter.help or "").replace("|", "\\|").replace("][", "]\\[")


def _default(parameter: Any) -> str:
    shown = parameter.show_default
    if isinstance(shown, str):
        return shown
    if parameter.required:
        return "required"
    empty = parameter.default is None or parameter.default is False or callable(parameter.default)
    return "" if empty or not shown else f"`{parameter.default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
