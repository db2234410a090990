"""How this process was started by torchrun, if it was: which of the server's ranks it is. Knows no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigError


@dataclass(frozen=True)
class Here:
    """rank: over all hosts. local: on this one."""

    rank: int
    local: int
    size: int

    def listen(self, address: str) -> str:
        """The address of this one: a host's ranks have ports that follow each other, from the one said."""
        host, colon, port = address.rpartition(":")
        return f"{host}{colon}{int(port) + self.local}" if port.isdecimal() and int(port) else address

    def device(self, name: str) -> str:
        """A GPU of its own, where there are any."""
        if name not in ("auto", "cuda"):
            return name
        import torch

        return f"cuda:{self.local}" if torch.cuda.is_available() or name == "cuda" else "cpu"


def begins(folder: Path, environment: Mapping[str, str]) -> bool:
    """Whether a run begins in this folder, since none is there yet: torchrun starts again by the very same
    command, which can only say --resume."""
    return environment.get("RANK") == "0" and not (folder / "run.json").exists()


def here(environment: Mapping[str, str]) -> Here | None:
    """None where there is but one process. Raises ConfigError where what torchrun says is incomplete."""
    if environment.get("WORLD_SIZE", "1") == "1" or "RANK" not in environment:
        return None
    try:
        return Here(*(int(environment[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"RANK, LOCAL_RANK and WORLD_SIZE must be numbers, as torchrun sets them: {error}"
        ) from error
