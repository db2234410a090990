"""Two network namespaces and the link between them: it delays, loses, has a rate, and goes dark.

The kernel's netem need not be there: each end is a TUN device, and a thread carries packets from one to the
other. What it does to TCP is what a network does, which no proxy can. Needs root, /dev/net/tun and iproute2.
"""

import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from pyroute2.netns import setns

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 1, 0x1000
_MTU = 1500
_AT_MOST = 20_000  # packets under way; above, they are lost
ADDRESS = {"here": "10.232.0.1", "there": "10.232.0.2"}


def why_not() -> str:
    """Why there can be no namespaces here; empty where there can."""
    if os.geteuid() != 0:
        return "needs root"
    if not shutil.which("ip"):
        return "needs iproute2"
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun"
    made = subprocess.run(["ip", "netns", "add", "dsl-probe"], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", "dsl-probe"], capture_output=True, check=False)
    return made.stderr.strip()


class Namespaces:
    """Here and there, with loopback in each, and a link of this kind between them.

    delay: seconds, one way. loss: the fraction of packets, each way. rate: bits per second, each way; 0: any.
    """

    def __init__(self, delay: float = 0.0, loss: float = 0.0, rate: float = 0.0, seed: int = 0) -> None:
        self._delay, self._loss, self._rate, self._dice = delay, loss, rate, random.Random(seed)
        self._names = {side: f"dsl-{side}-{os.getpid()}" for side in ADDRESS}
        self._dark, self._over = threading.Event(), threading.Event()
        self.dropped = 0

    def __enter__(self) -> "Namespaces":
        self._ends = [self._end(side) for side in ADDRESS]
        self._carrier = threading.Thread(target=self._carry, name="link", daemon=True)
        self._carrier.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._carrier.join()
        for end in self._ends:
            os.close(end)
        for name in self._names.values():
            subprocess.run(["ip", "netns", "del", name], check=True)

    def within(self, side: str) -> list[str]:
        """What a command begins with that is to run on this side."""
        return ["ip", "netns", "exec", self._names[side]]

    def go_dark(self) -> None:
        """No packet arrives any more, and nobody is told."""
        self._dark.set()

    def come_back(self) -> None:
        self._dark.clear()

    def _end(self, side: str) -> int:
        name = self._names[side]
        subprocess.run(["ip", "netns", "add", name], check=True)
        made: list[int] = []
        opener = threading.Thread(target=lambda: made.append(_tun(name)))  # a namespace is of a thread
        opener.start()
        opener.join()
        for command in (
            f"ip addr add {ADDRESS[side]}/24 dev link0",
            f"ip link set link0 mtu {_MTU} up",
            "ip link set lo up",
        ):
            subprocess.run([*self.within(side), *command.split()], check=True)
        return made[0]

    def _carry(self) -> None:
        under_way: list[tuple[float, int, int, bytes]] = []  # due, in order, to which end, the packet
        numbers, free = itertools.count(), [0.0, 0.0]
        while not self._over.is_set():
            now = time.monotonic()
            while under_way and under_way[0][0] <= now:
                _, _, end, packet = heapq.heappop(under_way)
                self._write(end, packet)
            due = under_way[0][0] - now if under_way else 0.1
            ready, _, _ = select.select(self._ends, [], [], min(0.1, max(0.0, due)))
            for handle in ready:
                origin = self._ends.index(handle)
                for packet in _packets(handle):
                    lost = self._dark.is_set() or self._dice.random() < self._loss
                    if lost or len(under_way) >= _AT_MOST:
                        self.dropped += 1
                        continue
                    out = time.monotonic()
                    if self._rate:
                        out = free[origin] = max(free[origin], out) + len(packet) * 8 / self._rate
                    heapq.heappush(under_way, (out + self._delay, next(numbers), 1 - origin, packet))

    def _write(self, end: int, packet: bytes) -> None:
        try:
            os.write(self._ends[end], packet)
        except OSError:
            self.dropped += 1  # its queue is full, as a router's may be


def _tun(name: str) -> int:
    """The device link0 in this namespace, by a thread that stays there and ends."""
    setns(name)
    handle = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(handle, _TUNSETIFF, struct.pack("16sH", b"link0", _IFF_TUN | _IFF_NO_PI))
    return handle


def _packets(handle: int) -> Sequence[bytes]:
    """Those that lie there now, some at a time."""
    packets = []
    for _ in range(64):
        try:
            packets.append(os.read(handle, 65536))
        except BlockingIOError:
            break
    return packets
