"""What may keep a client from its server, one check after the other: what was found, and what to do.

Once one has failed, those that need it are skipped.
"""

import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from common import tls
from common.errors import ConfigError, SplitLearningError
from common.tls import Credentials
from common.wire.rpc import VERSION
from dsl_lab.ping import Caller, CallError, Trip, median, rate

State = Literal["ok", "failed", "skipped"]
Address = tuple[str, int]

CHECKS = ("certificate", "name", "port", "TLS", "health", "version", "clock", "round trip", "bandwidth")
CONNECT_S = 3.0  # for each address
SAY_S = 5.0  # for each step of a handshake
SOON_DAYS = 14  # a certificate that ends within so many is told of
CLOCKS_S = 300.0  # how far two clocks may be apart
NEGLIGIBLE_S = 1.0
ENOUGH = 1000.0  # samples per second: what few clients compute (benchmarks/link has 700 of a core)
CODECS = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4, "int2": 2}  # bits of an element, without zstd
FOR_GRADIENTS = {"fp32": 32, "bf16": 16, "fp8": 8}  # which one scale a channel would spoil (docs/methods.md)


@dataclass(frozen=True)
class Finding:
    """found: in a line. remedy: what to do, where there is anything to do."""

    check: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Patient:
    """Whom to reach, and how: as dsl-client's flags."""

    server: str
    certs: Path | None
    insecure: bool

    @property
    def address(self) -> Address:
        """Host and port. Raises ConfigError."""
        host, colon, port = self.server.rpartition(":")
        if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(f"--server {self.server}: say host:port, such as gpu-host:50051")
        return host.removeprefix("[").removesuffix("]"), int(port)


def examine(patient: Patient) -> Iterator[Finding]:
    """Each check as soon as it is made, in the order of CHECKS. Raises ConfigError."""
    host, port = patient.address
    own, finding = certificate(patient.certs)
    yield finding
    addresses, finding = name(host, port)
    yield finding
    if addresses:
        finding = reachable(addresses, port)
        yield finding
    if finding.state != "ok":
        yield from _skipped(finding)
        return
    finding = encryption(patient, own)
    yield finding
    if finding.state == "failed" or (patient.certs and own is None):
        yield from _skipped(finding)
        return
    yield from _calls(patient, own)


def certificate(folder: Path | None) -> tuple[Credentials | None, Finding]:
    """This client's own, judged by this machine's clock."""
    if folder is None:
        return None, Finding("certificate", "skipped", "no --certs")
    try:
        own = Credentials.read(folder, "client")
    except SplitLearningError as error:
        made = "have it made anew where the authority is: dsl certs client"
        return None, Finding("certificate", "failed", str(error), made)
    ends = tls.certificate(folder / "client.pem").not_valid_after_utc
    days = (ends - tls.now()).days
    if own.name is None:
        return own, Finding(
            "certificate", "failed", f"{folder / 'client.pem'} names no client", "make one: dsl certs client"
        )
    soon = "it ends soon: have a new one made (dsl certs client)" if days < SOON_DAYS else ""
    return own, Finding(
        "certificate", "ok", f"{own.name}, valid until {ends:%Y-%m-%d} ({days} days); its key fits", soon
    )


def name(host: str, port: int) -> tuple[list[str], Finding]:
    """Every address that the name has."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the latter where it is too long for a name
        why = (error.strerror or str(error)) if isinstance(error, OSError) else "it is no name"
        return [], Finding(
            "name",
            "failed",
            f"{host} has no address: {why}",
            "is it spelled as on the server's machine? Try its address, or a line in /etc/hosts",
        )
    addresses = [str(address[0]) for *_, address in found]
    addresses = list(dict.fromkeys(addresses))
    said = f"{host} is {', '.join(addresses)}" if addresses != [host] else f"{host} is an address"
    return addresses, Finding("name", "ok", said)


def reachable(addresses: list[str], port: int) -> Finding:
    """Whether one of them takes connections; gRPC tries each."""
    errors: dict[str, OSError] = {}
    for address in addresses:
        try:
            socket.create_connection((address, port), CONNECT_S).close()
        except OSError as error:
            errors[address] = error
    taken = [address for address in addresses if address not in errors]
    said = "; ".join(f"{address} {_why(error)[0]}" for address, error in errors.items())
    if taken:
        also = f"; but {said}" if said else ""
        return Finding("port", "ok", f"{', '.join(taken)} takes connections at {port}{also}")
    return Finding("port", "failed", f"port {port}: {said}", _why(errors[addresses[0]])[1])


def _why(error: OSError) -> tuple[str, str]:
    """What a connection that was not made tells, and what to do."""
    if isinstance(error, ConnectionRefusedError):
        return "refuses: nothing listens there", (
            "is dsl-server running, with this port, and with --listen 0.0.0.0:PORT rather than 127.0.0.1?"
        )
    if isinstance(error, TimeoutError):
        return f"does not answer within {CONNECT_S:g} s", (
            "a firewall drops it, or the machine is off: open the port on the server's side, or use a tunnel"
        )
    return f"cannot be reached ({error.strerror})", "there is no way there: look at routes, VPN and address"


def encryption(patient: Patient, own: Credentials | None) -> Finding:
    """Shakes hands as gRPC will, by the standard library: it tells the reason where nothing comes of it."""
    if patient.certs and own is None:
        return Finding("TLS", "skipped", "it needs this client's certificate")
    try:
        shaken = tls.meet(patient.server, own, SAY_S)
        tls.check_exposure("--server", patient.server, patient.certs, patient.insecure)
    except SplitLearningError as error:
        return Finding("TLS", "failed", str(error))
    except TimeoutError:
        return Finding(
            "TLS",
            "failed",
            f"the server takes connections and says nothing for {SAY_S:g} s",
            "a tunnel or a container's port with no server behind it, or one that is frozen: look there",
        )
    except OSError as error:
        return Finding(
            "TLS",
            "failed",
            f"the server ends the connection ({error.strerror or type(error).__name__})",
            "is it dsl-server that listens there? Something in between may not let TLS pass",
        )
    if shaken is None:
        return Finding("TLS", "skipped", "none: nothing is encrypted, and no one's identity is known")
    return Finding(
        "TLS",
        "ok",
        f"{shaken.version}; the server is who it should be, its certificate valid until "
        f"{shaken.expires:%Y-%m-%d}",
    )


def _calls(patient: Patient, own: Credentials | None) -> Iterator[Finding]:
    with Caller(patient.server, own) as caller:
        finding = health(caller)
        yield finding
        if finding.state == "failed":
            yield from _skipped(finding)
            return
        try:
            trips = caller.small()
        except CallError as error:
            finding = _refused(error)
            yield finding
            yield from _skipped(finding)
            return
        yield versions(trips[0])
        yield clock(trips[0])
        yield round_trip(trips)
        yield bandwidth(caller, trips)


def health(caller: Caller) -> Finding:
    try:
        ready = caller.serves()
    except CallError as error:
        if error.code == "UNIMPLEMENTED":
            return Finding("health", "skipped", "a gRPC server that does not tell: is it dsl-server?")
        return Finding(
            "health",
            "failed",
            f"no answer by gRPC ({error.code}: {error})",
            "another program's port? What is in between must let HTTP/2 pass as it is",
        )
    if ready:
        return Finding("health", "ok", "the server is ready")
    return Finding(
        "health",
        "failed",
        "the server is there and not ready",
        "it starts, drains, or cannot write its checkpoints: its own last lines say which",
    )


def _refused(error: CallError) -> Finding:
    if error.code == "UNIMPLEMENTED":
        return Finding(
            "version",
            "skipped",
            "the server does not know the call Ping: it is of an older release",
            f"install the same release on both; here it is {version('decoupled-split-learning')}",
        )
    if error.code == "RESOURCE_EXHAUSTED":
        return Finding("version", "failed", f"the server is busy ({error})", "try again in a while")
    return Finding("version", "failed", f"the server would not answer ({error.code}): {error}")


def versions(trip: Trip) -> Finding:
    """Of the protocol, which must fit, and of the release, which should."""
    answer, ours = trip.answer, version("decoupled-split-learning")
    theirs = answer.release[:40]
    spoken = f"{answer.oldest_version} to {answer.newest_version}"
    if not answer.oldest_version <= VERSION <= answer.newest_version:
        found = f"the server (release {theirs}) speaks protocol version {spoken}, this machine {VERSION}"
        return Finding("version", "failed", found, "install the same release on both")
    same = "" if theirs == ours else f"the releases differ: here it is {ours}; best have the same on both"
    return Finding("version", "ok", f"protocol {VERSION}, release {theirs}", same)


def clock(fastest: Trip) -> Finding:
    apart, doubt = abs(fastest.ahead), fastest.seconds / 2
    way = "behind" if fastest.ahead > 0 else "ahead of"
    found = f"this machine's is {apart:,.3f} s {way} the server's (give or take {doubt:.3f} s)"
    if apart - doubt <= CLOCKS_S:
        note = "" if apart <= max(NEGLIGIBLE_S, doubt) else "times in logs will not match: use NTP on both"
        return Finding("clock", "ok", found, note)
    return Finding(
        "clock", "failed", found, "set both by NTP: certificates are judged by each machine's own clock"
    )


def round_trip(trips: list[Trip]) -> Finding:
    fastest, slowest = trips[0].seconds * 1e3, trips[-1].seconds * 1e3
    found = f"{median(trips) * 1e3:,.1f} ms (median of {len(trips)}; {fastest:,.1f} to {slowest:,.1f})"
    return Finding("round trip", "ok", found)


def bandwidth(caller: Caller, trips: list[Trip]) -> Finding:
    """Of random bytes, each way by itself; and what that means for the run."""
    try:
        up = rate(lambda size: caller.ping(up=size), median(trips))
        down = rate(lambda size: caller.ping(down=size), median(trips))
    except CallError as error:
        return Finding(
            "bandwidth",
            "failed",
            f"a large message did not pass ({error.code}: {error})",
            "the link is too slow to train over, or something on it drops large packets: try a smaller MTU",
        )
    answer = trips[0].answer
    found = f"up {_said(up)}, down {_said(down)}"
    return Finding("bandwidth", "ok", found, advice(up, down, answer.sample_bytes, answer.one_way))


def advice(up: float, down: float, sample_bytes: int, one_way: bool) -> str:
    """How the run's samples can travel at so many bytes per second. sample_bytes: of one as fp32; 0: none
    travels."""
    if not sample_bytes:
        return ""
    carried = _samples(up if one_way else min(up, down), sample_bytes, CODECS)
    said = ", ".join(f"{codec} {samples:,.0f}" for codec, samples in carried.items())
    text = f"samples of this run that it carries a second ({sample_bytes / 1e3:,.1f} kB each): {said}"
    if carried["fp32"] >= ENOUGH:
        return f"{text}; --codec is of no need"
    if one_way:
        return f"{text}; a client that is faster waits, but for dsl-server --link auto, which fits the link"
    ways = {"activations": (up, CODECS, "int4"), "gradients": (down, FOR_GRADIENTS, "fp8")}
    fitting = {
        kind: next((name for name, n in _samples(rate, sample_bytes, codecs).items() if n >= ENOUGH), least)
        for kind, (rate, codecs, least) in ways.items()
    }
    settings = " ".join(f"{kind}={codec}" for kind, codec in fitting.items() if codec != "fp32")
    return f"{text}; dsl-server --codec {settings}, or a later cut (dsl cuts)"


def _samples(rate: float, sample_bytes: int, codecs: Mapping[str, int]) -> dict[str, float]:
    """A second, by codec. codecs: bits of an element."""
    return {name: 32 * rate / (bits * sample_bytes) for name, bits in codecs.items()}


def _said(rate: float) -> str:
    """In both units that people use."""
    return f"{rate / 1e6:,.2f} MB/s ({8 * rate / 1e6:,.1f} Mbit/s)"


def _skipped(after: Finding) -> Iterator[Finding]:
    """Those checks that come after this one."""
    for check in CHECKS[CHECKS.index(after.check) + 1 :]:
        yield Finding(check, "skipped", f"not before {after.check}")
