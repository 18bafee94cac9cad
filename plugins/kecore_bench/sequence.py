"""Progress of a sequence of edits on disk, from where a run that was cut off goes on.

The next edit needs the edits that act, each of which is written once, and what the method remembers. What is worked
out from the unedited model, such as sampled contexts, is not written: it is worked out again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import rmtree
from time import monotonic

from torch import Tensor

from kecore.edit import Edit, acting, load_edit
from kecore.files import read_tensors, write_tensors

__all__ = ["Progress", "SavedSequence"]

_KIND = "edit-sequence"
_FORMAT = 1
_STATE = "state.safetensors"

SHARE = 0.05
"""Share of the time that keeping may take."""


@dataclass(frozen=True)
class Progress:
    """Progress of a sequence of edits.

    Args:
        steps: steps that are done.
        edits: their edits that act, oldest first.
        state: what the method remembers.
    """

    steps: int
    edits: Sequence[Edit]
    state: Mapping[str, Tensor]


@dataclass
class SavedSequence:
    """A folder that holds how far one sequence is.

    Args:
        folder: a folder of this sequence alone.
    """

    folder: Path
    _names: dict[Edit, str] = field(default_factory=dict, init=False, repr=False)
    _due: float = field(default=0.0, init=False, repr=False)

    def keep(self, steps: int, edits: Sequence[Edit], state: Mapping[str, Tensor], *, last: bool = False) -> None:
        """Write how far the sequence is, whole or not at all; if it was written lately, not at all.

        Args:
            steps: steps that are done and scored.
            edits: all edits of the sequence, oldest first.
            state: what the method remembers.
            last: write in any case.

        Raises:
            StorageError: the disk is full, or not writable.
        """
        begin = monotonic()
        if begin < self._due and not last:
            return
        names: dict[Edit, str] = {}
        for index, edit in enumerate(acting(edits)):
            if edit in self._names:
                names[edit] = self._names[edit]
            else:
                names[edit] = self._write(edit, f"{steps:06d}-{index}")
        header = {"format": _FORMAT, "steps": steps, "edits": list(names.values())}
        write_tensors(self.folder / _STATE, _KIND, header, state)
        for name in set(self._names.values()) - set(names.values()):
            (self.folder / name).unlink(missing_ok=True)
        self._names = names
        self._due = monotonic() + (monotonic() - begin) / SHARE

    def _write(self, edit: Edit, name: str) -> str:
        # The state of the last step serves; that of each would grow with the square of their number.
        return replace(edit, state={}).save(self.folder / f"{name}.safetensors").name

    def load(self) -> Progress | None:
        """Read how far the sequence was; None where nothing was written.

        Raises:
            ArtifactError: a file is missing or corrupt.
        """
        if not (self.folder / _STATE).is_file():
            return None
        header, tensors = read_tensors(self.folder / _STATE, _KIND, newest=_FORMAT)
        edits = [load_edit(self.folder / name) for name in header["edits"]]
        self._names = dict(zip(edits, header["edits"], strict=True))
        return Progress(header["steps"], edits, {name: tensor.clone() for name, tensor in tensors.items()})

    def remove(self) -> None:
        """Delete the folder."""
        if self.folder.is_dir():
            rmtree(self.folder)
