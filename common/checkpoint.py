"""A part saved and restored: safetensors and JSON, written whole or not at all, never pickled."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.errors import ConfigError
from common.methods.base import Part
from common.parts import load_state, specs, state_of

_TENSORS, _FACTS = "part.safetensors", "facts.json"


def save(folder: Path, part: Part, facts: dict[str, Any]) -> None:
    """Writes weights, buffers and momentum, and facts about them that JSON can hold."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in state_of(part).items()}
    save_file(tensors, folder / f".{_TENSORS}.tmp")
    os.replace(folder / f".{_TENSORS}.tmp", folder / _TENSORS)
    (folder / f".{_FACTS}.tmp").write_text(json.dumps(facts, indent=2) + "\n")
    os.replace(folder / f".{_FACTS}.tmp", folder / _FACTS)


def restore(folder: Path, part: Part) -> dict[str, Any]:
    """Puts the weights back, in place; the facts. Raises ConfigError when they are not this part's."""
    try:
        tensors = load_file(folder / _TENSORS)
        facts: dict[str, Any] = json.loads((folder / _FACTS).read_text())
    except (OSError, SafetensorError, ValueError, RecursionError) as error:  # of files, tensors, JSON
        raise ConfigError(f"checkpoint {folder} cannot be read: {error}") from error
    if specs(tensors) != specs(state_of(part)):
        raise ConfigError(f"checkpoint {folder} is of another network, split or head than this run's")
    load_state(part, tensors)
    return facts
