"""What a process needs to go on, on disk: safetensors and JSON, written whole or not at all, never pickled.

`save` and `restore` are of one part, as a run leaves it. `Checkpoints` are of a run under way: the last few,
each a folder that appears by one rename when all of it is on the disk.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.disk import replace_file, sync
from common.errors import ConfigError
from common.methods.base import Part
from common.parts import State, load_state, specs, state_of

_TENSORS, _FACTS = "part.safetensors", "facts.json"


def save(folder: Path, state: State, facts: dict[str, Any]) -> None:
    """Writes a part's weights, buffers and momentum, and facts about them that JSON can hold."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach() for name, tensor in state.items()}
    _save_file(tensors, folder / f".{_TENSORS}.tmp")
    os.replace(folder / f".{_TENSORS}.tmp", folder / _TENSORS)
    replace_file(folder / _FACTS, json.dumps(facts, indent=2) + "\n")


def restore(folder: Path, part: Part) -> dict[str, Any]:
    """Puts the weights back, in place; the facts. Raises ConfigError when they are not this part's."""
    known = facts_of(folder)
    try:
        tensors = load_file(folder / _TENSORS)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"checkpoint {folder} cannot be read: {error}") from error
    if specs(tensors) != specs(state_of(part)):
        raise ConfigError(f"checkpoint {folder} is of another network, split or head than this run's")
    load_state(part, tensors)
    return known


def facts_of(folder: Path) -> dict[str, Any]:
    """What was saved beside the weights. Raises ConfigError."""
    try:
        known: dict[str, Any] = json.loads((folder / _FACTS).read_text())
    except (OSError, ValueError, RecursionError) as error:  # of files, of JSON
        raise ConfigError(f"checkpoint {folder} cannot be read: {error}") from error
    if not isinstance(known, dict):
        raise ConfigError(f"checkpoint {folder} cannot be read: {_FACTS} is no table")
    return known


@dataclass(frozen=True)
class Saved:
    """A state under its number. Its tensors are its own: nobody changes them."""

    number: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class Checkpoints:
    """States in a folder, by their numbers, which grow.

    on_disk: a state survives a loss of power, and not only of the process; it costs the disk's time.
    """

    def __init__(self, folder: Path, on_disk: bool = True) -> None:
        self._folder, self._on_disk = folder, on_disk

    def numbers(self) -> list[int]:
        """Those that there are, the oldest first."""
        if not self._folder.is_dir():
            return []
        return sorted(int(entry.name) for entry in self._folder.iterdir() if entry.name.isdecimal())

    def write(self, saved: Saved) -> None:
        """Raises OSError when the disk will not have it; then nothing of it is left."""
        self._folder.mkdir(parents=True, exist_ok=True)
        left = unfinished = self._folder / f".{saved.number}.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir()
            _save_file(saved.tensors, unfinished / _TENSORS)
            digest = _digest(unfinished / _TENSORS)
            facts = json.dumps(saved.facts)
            whole = {"tensors": digest, "check": hashlib.sha256(facts.encode()).hexdigest(), "facts": facts}
            (unfinished / _FACTS).write_text(json.dumps(whole))
            for path in (unfinished / _TENSORS, unfinished / _FACTS, unfinished):
                self._sync(path)
            left = unfinished.rename(self._path(saved.number))
            self._sync(self._folder)
        except BaseException:
            shutil.rmtree(left, ignore_errors=True)
            raise

    def read(self, number: int) -> Saved:
        """Raises ConfigError when it is damaged."""
        folder = self._path(number)
        try:
            whole = json.loads((folder / _FACTS).read_text())
            facts = str(whole["facts"])
            if hashlib.sha256(facts.encode()).hexdigest() != whole["check"]:
                raise ValueError("its facts are not those that were written")
            if _digest(folder / _TENSORS) != whole["tensors"]:
                raise ValueError("its tensors are not those that were written")
            return Saved(number, load_file(folder / _TENSORS), json.loads(facts))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(f"checkpoint {folder} is damaged: {error}") from error

    def newest(self, on_damage: Callable[[str], None]) -> Iterator[Saved]:
        """Those that can be read, the newest first; who is not is told of, loudly, and passed over."""
        for number in reversed(self.numbers()):
            try:
                yield self.read(number)
            except ConfigError as error:
                on_damage(f"{error}; the one before is used")

    def drop(self, keep: Callable[[int], bool]) -> None:
        """All but those of the numbers to keep."""
        for number in self.numbers():
            if not keep(number):
                # First out of sight: what is removed only in part is no checkpoint.
                removed = self._folder / f".{number}.old"
                os.rename(self._path(number), removed)
                shutil.rmtree(removed, ignore_errors=True)

    def tidy(self) -> None:
        """Removes what a process left that was killed while it wrote."""
        if self._folder.is_dir():
            for entry in self._folder.iterdir():
                if entry.name.startswith("."):
                    shutil.rmtree(entry, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08}"

    def _sync(self, path: Path) -> None:
        if self._on_disk:
            sync(path)


def _save_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # of the disk: the tensors are ours
        raise OSError(str(error)) from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
