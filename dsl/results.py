"""What a run came to, read from the folders that it left."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ConfigError
from common.run import Run, checked
from dsl.html import html_table
from dsl_lab import runs, table
from dsl_lab.runs import SERVER, Evaluation, FinishedRun, Summary
from dsl_lab.series import Group, grouped, shared

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Evaluation", "Results", "read"]


@dataclass(frozen=True)
class Results:
    """A run that has finished. Bytes are of all clients together, and of what training sent: activations,
    labels, gradients. In a notebook it shows itself as a table."""

    finished: FinishedRun
    """All that its files say: `summary` has traffic by kind, seconds by phase, peak memory."""

    @property
    def folder(self) -> Path:
        """The server's folder: run.json, metrics.jsonl, summary.json, checkpoint/."""
        return self.finished.folder

    @property
    def run(self) -> Run:
        """What was trained, and how."""
        return Run(**checked(self.finished.about.run, str(self.folder / "run.json")))

    @property
    def summary(self) -> Summary:
        return self.finished.summary

    @property
    def accuracy(self) -> float | None:
        """Of the joined network on the test set, in the end: 0 to 1; None where another metric is scored."""
        return self.summary.test.accuracy

    @property
    def score(self) -> float | None:
        """Of the joined network by the run's metric, whichever that is."""
        return self.summary.test.joined

    @property
    def accuracy_alone(self) -> float | None:
        """Of the client's part with its own head; None where the method has no such head."""
        return self.summary.test.client_only_accuracy

    @property
    def bytes_up(self) -> int:
        return self.finished.payload_up

    @property
    def bytes_down(self) -> int:
        return self.finished.payload_down

    @property
    def seconds(self) -> float:
        """From the first client's joining to the last one's goodbye."""
        return self.summary.seconds.wall

    @property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """A line for each time that the test set was scored."""
        return self.finished.evaluations

    def state_dict(self, client: int = 0) -> "dict[str, Tensor]":
        """The joined network's weights and buffers, with this client's part, by their names in the network.

        Where parts are averaged, all clients have the same. Raises ConfigError where the client's folder is
        not beside the server's.
        """
        from safetensors.torch import load_file

        joined = {}
        for folder in (self.folder.parent / f"client-{client}", self.folder):
            path = folder / "checkpoint" / "part.safetensors"
            if not path.exists():
                raise ConfigError(f"{path} is not there: a client's part is where that client ran")
            for name, tensor in load_file(path).items():
                part, _, inside = name.partition(".")
                if part in ("bottom", "top", "tail"):
                    joined[inside] = tensor
        return joined

    def _repr_html_(self) -> str:
        return html_of(grouped([self.finished]))

    def __repr__(self) -> str:
        return (
            f"<{self.finished.method}: {self.summary.test.name} {self.score:.4f}, "
            f"{self.bytes_up / 1e6:,.1f} MB up, "
            f"{self.bytes_down / 1e6:,.1f} MB down, {self.seconds:.1f} s; {self.folder}>"
        )


def read(folder: str | Path) -> Results:
    """Of a server's folder, or one that has it as `server`. Raises ConfigError where no run has finished."""
    path = Path(folder)
    return Results(runs.read(path / SERVER if (path / SERVER / "run.json").exists() else path))


def html_of(group: Group) -> str:
    """A table with a row for each series."""
    heads = table.headings(group)
    return html_table(
        [name for _, name in heads], table.rows(group), [over for over, _ in heads], caption=shared(group)
    )
