"""Predictions as a file: .csv, a short row each; or .jsonl, an object each, which has the logits, too."""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

from common.errors import ConfigError
from dsl_client.predictor import Predicted

COLUMNS = ("image", "class", "probability", "label", "by")


class Predictions:
    """classes: their names, by index; their numbers stand for those that have none.

    What has been written is counted. right: of those whose label is known.
    """

    def __init__(self, path: Path, classes: Sequence[str]) -> None:
        self._path, self._classes = path, classes
        self.count = self.alone = self.labelled = self.right = 0

    @contextmanager
    def open(self) -> Iterator[IO[str]]:
        """The file, which is there under its name when it is whole, or not at all. Raises ConfigError."""
        unfinished = self._path.with_name(f".{self._path.name}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("w", newline="", encoding="utf-8") as file:
                if self._path.suffix == ".csv":
                    csv.writer(file).writerow(COLUMNS)
                yield file
            os.replace(unfinished, self._path)
        except OSError as error:
            raise ConfigError(f"--out {self._path}: {error.strerror}") from error
        finally:
            unfinished.unlink(missing_ok=True)

    def write(self, file: IO[str], predicted: Predicted) -> None:
        """A batch of rows."""
        portion, logits = predicted.portion, predicted.logits
        likely = torch.softmax(logits.double(), 1).max(1)
        labels: Sequence[int | None] = portion.labels or [None] * len(logits)
        by = "alone" if predicted.alone else "server"
        for name, index, probability, label, row in zip(
            portion.names,
            likely.indices.tolist(),
            likely.values.tolist(),
            labels,
            logits.tolist(),
            strict=True,
        ):
            told = None if label is None else self._name(label)
            if self._path.suffix == ".csv":
                csv.writer(file).writerow([name, self._name(index), f"{probability:.6f}", told, by])
            else:
                line = {
                    "image": name,
                    "class": self._name(index),
                    "probability": probability,
                    "label": told,
                    "by": by,
                    "predicted": index,
                    "labelled": label,
                    "logits": row,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self.labelled += label is not None
            self.right += label == index
        self.count += len(logits)
        self.alone += len(logits) * predicted.alone

    def _name(self, index: int) -> str:
        return self._classes[index] if index < len(self._classes) else str(index)
