"""Many clients in one process, for experiments with more of them than a machine could have processes.

Each is a thread that runs the code of a client alone: its own share of the data, part of the network,
identity, folders and session. What they have in common is in `commons.py`, who computes when in `turns.py`,
where parts are meanwhile in `rest.py`. Knows who is there and how each one ends; shows nothing.
"""

import json
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from common.disk import replace_file
from common.errors import ClosedError, ConfigError, RefusedError, SplitLearningError
from common.limits import allow_files
from common.meter import peak_bytes
from common.run import Run
from dsl_client.client import Client
from dsl_client.commons import Commons
from dsl_client.connection import says_left
from dsl_client.stream import look_seldom
from dsl_client.trainer import Step
from dsl_client.turns import Workers
from dsl_client.watch import View, Watch, together

STOP_S = 10.0  # for all to say goodbye, and to come to the end of what they compute
_OTHER_FILES = 200  # that the process may have open, beside those of its replicas


class Replica(threading.Thread):
    """One client. error: what ended it, if not its last batch."""

    def __init__(self, number: int, client: Client) -> None:
        super().__init__(name=f"replica-{number}", daemon=True)
        self.number, self.client = number, client
        self.watch: Watch | None = None  # once it is a member
        self.well = False  # whether it has trained to the end
        self.error: BaseException | None = None
        self._reason: ClosedError | None = None

    def enter(self, patience: float, takeover: bool) -> None:
        """Makes it a member. One that comes back, and had trained to the end, has ended well."""
        try:
            self.client.join(patience, takeover)
        except RefusedError as refused:
            if not says_left(refused):
                raise
            self.well = True
        else:
            self.watch = Watch(self.client)

    def begin(self, workers: Workers, out: Path, tell: Callable[[str], None]) -> None:
        """Trains it, in its thread, whenever there is a permit."""
        self._workers, self._out, self._tell = workers, out / f"client-{self.client.index}", tell
        self.start()

    def run(self) -> None:
        torch.set_num_threads(1)  # of this thread: there are other workers
        try:
            with self._workers.turn():
                self._train()
            self.well = True
        except (SplitLearningError, ValueError) as error:  # the latter is gRPC's, of a closed channel
            self.error = self._reason or error
            if not isinstance(self.error, ClosedError):
                self._tell(f"{self} failed: {error}")
        except BaseException as error:  # noqa: BLE001  # raised again by who waits for all
            self.error = error
        finally:
            if self._reason is None:  # else `stop` has: who may come back says no word of failure
                self.close(self.error)

    def stop(self, reason: ClosedError) -> None:
        """Ends its membership, from any thread."""
        self._reason = reason
        self.close(None if self.client.can_return else reason)

    def close(self, error: BaseException | None) -> None:
        told = error.told if isinstance(error, SplitLearningError) else type(error).__name__ if error else ""
        with suppress(ValueError):  # gRPC's: the channel is closed
            self.client.close(told)

    def __str__(self) -> str:
        return f"replica {self.number} (client {self.client.index})"

    def _train(self) -> None:
        assert self.watch is not None, "it is a member"
        watch = self.watch

        def stepped(step: Step) -> None:
            if self._reason:
                raise self._reason
            watch.step(step)

        self.client.train(self._out, stepped, watch.scored, lambda words: self._tell(f"{self}: {words}"))


class Replicas:
    """make: a client by its number, from 0. workers: how many compute at a time. tell: told, in a line, what
    befalls one of them."""

    def __init__(
        self,
        count: int,
        workers: int,
        make: Callable[[int, Commons], Client],
        commons: Commons,
        tell: Callable[[str], None],
    ) -> None:
        look_seldom()
        self._commons, self._workers, self._tell = commons, Workers(workers), tell
        self._replicas = [Replica(number, make(number, commons)) for number in range(count)]
        self._start = time.perf_counter()

    def join(self, patience: float, takeover: bool, on_joined: Callable[[int], None]) -> Run | None:
        """One after the other, so that each has its number; the run, or None where all had come to its end.
        on_joined: told how many have. Raises ConfigError where there are fewer places, and as a client's."""
        run: Run | None = None
        for number, replica in enumerate(self._replicas):
            replica.enter(patience, takeover)
            if run is None and replica.watch:
                run = replica.client.run
                if run.clients < len(self._replicas):
                    raise ConfigError(
                        f"--replicas {len(self._replicas)}: the run has places for {run.clients} clients; "
                        f"start the server with --clients {len(self._replicas)}, or fewer replicas"
                    )
            on_joined(number + 1)
        return run

    def train(self, out: Path, wait: Callable[[], None]) -> None:
        """To the end of all. wait: called again and again meanwhile, and lasts a moment. Raises, of what they
        ended by, what is none of the others' doing."""
        try:
            for replica in self._members():
                replica.begin(self._workers, out, self._tell)
        except RuntimeError as error:  # of threading
            raise ConfigError(
                f"--replicas {len(self._replicas)}: no more threads may be started here ({error}); raise "
                "ulimit -u or the container's limit of processes, or start fewer"
            ) from error
        while any(replica.is_alive() for replica in self._replicas):
            wait()
        self._write(out)
        errors = [replica.error for replica in self._replicas if replica.error]
        if errors:
            raise next((error for error in errors if not isinstance(error, ClosedError)), errors[0])

    def stop(self, reason: str) -> None:
        """Ends all memberships; their threads end within a moment, or with the process."""
        end = time.monotonic() + STOP_S
        for replica in self._replicas:
            if time.monotonic() < end:
                replica.stop(ClosedError(reason))
        self._commons.close()
        for replica in self._replicas:
            if replica.ident is not None:  # it was started
                replica.join(max(0.0, end - time.monotonic()))

    @property
    def ended_well(self) -> int:
        return sum(replica.well for replica in self._replicas)

    def view(self) -> View:
        """All of them as one."""
        views = [replica.watch.view() for replica in self._members() if replica.watch]
        return together(views, ended=sum(not replica.is_alive() for replica in self._members()))

    def _members(self) -> Sequence[Replica]:
        return [replica for replica in self._replicas if replica.watch]

    def _write(self, out: Path) -> None:
        """replicas.json: how each one ended, and what the process came to."""
        failed = {str(replica): str(replica.error) for replica in self._replicas if replica.error}
        whole: dict[str, Any] = {
            "replicas": len(self._replicas),
            "ended_well": self.ended_well,
            "failed": failed,
            "seconds": time.perf_counter() - self._start,
            "peak_bytes": peak_bytes(torch.device("cpu")),
        }
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / "replicas.json", json.dumps(whole, indent=2) + "\n")


def check_files(count: int, each: int) -> None:
    """Raises ConfigError where so many replicas could not have their files open, `each` so many at a time."""
    needed = count * each + _OTHER_FILES
    if (most := allow_files(needed)) < needed:
        raise ConfigError(
            f"--replicas {count}: they need up to {needed} open files, and this process may have {most}; "
            f"raise ulimit -n to {needed}, or start fewer"
        )
