"""Case F5: the ledger against a plain model of it, through whatever may be lost, repeated, or die.

No sockets, no clock, no threads. By default 1,000 runs of up to 30 steps; DSL_F5_EXAMPLES makes it others.
"""

import hashlib
import json
import os
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.errors import (
    ConflictError,
    FullError,
    RefusedError,
    SequenceError,
    SplitLearningError,
    StaleError,
    TakenError,
)
from dsl_server.ledger import Account, Ledger, Mark, Newcomer, hashed

pytestmark = pytest.mark.timeout(60 if "DSL_F5_EXAMPLES" not in os.environ else 3600)

PLACES, KEPT = 2, 3  # of checkpoints
NAMES = ("ann", "bob", "cid")  # one too many
SIZES = (8, 8, 3, 8, 8, 3)  # samples of each batch: two epochs of three
LAST = len(SIZES)

Fact = dict[str, Any]


def digest_of(name: str, sequence: int) -> int:
    return 1000 * NAMES.index(name) + sequence


def chains_of(name: str) -> list[str]:
    """The chain after each number, from 0."""
    chains = [hashlib.sha256().hexdigest()]
    for sequence, samples in enumerate(SIZES, 1):
        link = f"{chains[-1]} {sequence} {samples} {digest_of(name, sequence)}"
        chains.append(hashlib.sha256(link.encode()).hexdigest())
    return chains


# What each client's mark must be after each number.
MARKS = {
    name: [(n, sum(SIZES[:n]), chain, n // 3) for n, chain in enumerate(chains_of(name))] for name in NAMES
}


def facts_of(mark: Mark) -> tuple[int, int, str, int]:
    return mark.sequence, mark.samples, mark.chain, mark.epochs


class Deliveries(RuleBasedStateMachine):
    """A server's ledger, its checkpoints, and processes of clients that send, against dictionaries.

    A process is a dictionary, too: what a client has in memory and in its folder.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(PLACES)
        self.known: dict[str, Fact] = {}  # by name: what the ledger should know
        self.trained: dict[str, list[int]] = {}  # by name: the numbers that the weights have learned from
        self.lanes: dict[str, list[Mark]] = {}  # by name: received and not applied
        self.checkpoints: list[tuple[str, Any]] = []  # kept: the snapshot as text, and the model's own
        self.duplicates = 0
        self.numbered = dict.fromkeys(NAMES, 0)
        self.processes: dict[str, list[Fact]] = {}

    @initialize(nameless=st.booleans(), sent=st.integers(0, LAST), learned=st.integers(0, LAST))
    def begin(self, nameless: bool, sent: int, learned: int) -> None:
        """nameless: the last client has no identity, and so cannot come back. sent, learned: by the first."""
        for index, name in enumerate(NAMES):
            identity = "" if nameless and name == NAMES[-1] else f"{index:032}"
            self.processes[name] = [{"identity": identity, "run": "", "durable": 0, "session": "", "next": 1}]
        if sent:
            self.joins(0, "")
            self.sends(0, sent)
            self.learn(NAMES[0], learned)

    # ------------------------------------------------------------ helpers

    def account(self, name: str) -> Account:
        return self.ledger.accounts[self.known[name]["client"]]

    def nothing_changes(self, kind: type[SplitLearningError], does: Any) -> SplitLearningError:
        """It raises exactly this, and the ledger is as it was."""
        before = self.all_of_it()
        with pytest.raises(kind) as caught:
            does()
        assert type(caught.value) is kind
        assert self.all_of_it() == before
        return caught.value

    def all_of_it(self) -> tuple[Any, ...]:
        ledger = self.ledger
        return ledger.run_id, ledger.duplicates, [dict(vars(account)) for account in ledger.accounts]

    def save(self) -> None:
        text = json.dumps(self.ledger.snapshot())
        self.checkpoints.append((text, deepcopy((self.known, self.trained))))
        self.checkpoints = self.checkpoints[-KEPT:]

    def start_anew(self, damaged: int = 0) -> None:
        """The server dies, and goes on from the newest checkpoint but so many."""
        del self.checkpoints[max(1, len(self.checkpoints) - damaged) :]
        self.known, self.trained, self.lanes, self.duplicates = {}, {}, {}, 0
        if not self.checkpoints:
            self.ledger = Ledger(PLACES)
            return
        text, model = self.checkpoints[-1]
        self.ledger = Ledger.restored(PLACES, json.loads(text))
        self.known, self.trained = deepcopy(model)
        for name, known in self.known.items():
            forgotten = {"session": "", "own": set(), "received": known["applied"], "latest": False}
            known |= {**forgotten, "present": False}
            self.lanes[name] = []

    def refusal(self, name: str, process: Fact, takeover: bool) -> type[SplitLearningError] | None:
        """Why the process may not join, if it may not."""
        known = self.known.get(name) if process["identity"] else None
        if process["run"] and (known is None or process["run"] != self.ledger.run_id):
            return RefusedError
        if known is None:
            return FullError if len(self.known) == PLACES else None
        if known["left"] or known["lost"]:
            return RefusedError
        assert known["applied"] >= process["durable"], "it has thrown away what the server still needs"
        if process["session"] in known["fenced"]:
            return RefusedError
        if process["session"] and known["session"] and process["session"] not in known["own"]:
            return RefusedError
        if known["present"] and not (process["session"] or takeover):
            return TakenError
        return None

    def join(self, name: str, process: Fact, takeover: bool, crash: str = "") -> None:
        who = Newcomer(
            name, process["identity"], process["run"], process["session"], process["durable"], takeover
        )
        if not process["identity"] and name in self.known:
            return  # it would be another client of that name
        if reason := self.refusal(name, process, takeover):
            self.nothing_changes(reason, lambda: self.ledger.join(who))
            return
        account = self.ledger.join(who)
        if name not in self.known:
            self.known[name] = {
                "client": len(self.known),
                "sessions": 0,
                "received": 0,
                "applied": 0,
                "left": False,
                "lost": "",
                "latest": False,
                "own": set(),  # sessions of the process that is here
                "fenced": set(),  # of those that were here before it
            }
            self.trained[name], self.lanes[name] = [], []
        known = self.known[name]
        assert account.session not in ("", known.get("session"))
        if not process["session"]:  # a new process
            known["fenced"] |= known["own"]
            known["own"] = set()
        known["own"] |= {process["session"], account.session} - {""}
        known |= {"sessions": known["sessions"] + 1, "session": account.session, "present": True}
        if crash != "before it is saved":
            self.save()
        if crash:
            self.start_anew()  # and the client is not told of its place
            return
        process["session"], process["run"] = account.session, self.ledger.run_id
        process["next"] = account.received.sequence + 1

    def pick(self, which: int) -> tuple[str, Fact]:
        name = NAMES[which % len(NAMES)]
        processes = self.processes[name]
        return name, processes[which % len(processes)]

    def member(self, which: int) -> tuple[str, Fact] | None:
        """A process that has joined a run, of a client that the server knows."""
        for offset in range(len(NAMES)):
            name, process = self.pick(which + offset)
            if name in self.known and process["session"]:
                return name, process
        return None

    def arrive(self, name: str, process: Fact, sequence: int, digest: int | None = None) -> bool:
        """A batch comes to the server; whether it is taken."""
        known, account = self.known[name], self.account(name)
        digest, due = digest or digest_of(name, sequence), known["received"] + 1
        samples, last = SIZES[sequence - 1], sequence % 3 == 0
        self.numbered[name] = max(self.numbered[name], sequence)

        def receive() -> Mark | None:
            return self.ledger.receive(account, process["session"], sequence, samples, digest, last)

        if process["session"] != known["session"] or not known["present"]:
            self.nothing_changes(StaleError, receive)
            return False
        if sequence > due or (sequence < due and not process["identity"]):
            error = self.nothing_changes(SequenceError, receive)
            assert isinstance(error, SequenceError)
            assert error.expected == due
            process["next"] = due
            return False
        if sequence < due:
            if known["latest"] and sequence == due - 1 and digest != digest_of(name, sequence):
                self.nothing_changes(ConflictError, receive)
                return False
            assert receive() is None
            self.duplicates += 1
            return False
        mark = receive()
        assert mark is not None
        self.lanes[name].append(mark)
        known["received"], known["latest"] = sequence, True
        return True

    def learn(self, name: str, count: int) -> None:
        lane, known = self.lanes[name], self.known[name]
        for mark in lane[:count]:
            self.trained[name].append(mark.sequence)
            self.ledger.apply(self.account(name), mark)
            known["applied"] = mark.sequence
        del lane[:count]

    # ------------------------------------------------------------ who is there

    @rule(which=st.integers(0, 5), crash=st.sampled_from(("", "", "before it is saved", "before it is told")))
    def joins(self, which: int, crash: str) -> None:
        """For the first time, or again: after its connection broke, or as a process of its own."""
        self.join(*self.pick(which), takeover=False, crash=crash)

    @rule(which=st.integers(0, 5))
    def takes_over(self, which: int) -> None:
        self.join(*self.pick(which), takeover=True)

    @rule(which=st.integers(0, 2))
    def a_second_process_has_a_copy_of_the_folder(self, which: int) -> None:
        name = NAMES[which]
        if len(self.processes[name]) < 2 and self.processes[name][0]["identity"]:
            self.processes[name].append(self.processes[name][0] | {"session": ""})

    @rule(run=st.sampled_from(("", "this", "another")), which=st.integers(0, 2))
    def a_stranger_comes(self, run: str, which: int) -> None:
        """With the name of another, where each name is one client's; or to a run that it was never in."""
        run_id = {"": "", "this": self.ledger.run_id, "another": "0" * 16}[run]
        who = Newcomer(NAMES[which], "f" * 32, run_id, single=True)
        if run:
            self.nothing_changes(RefusedError, lambda: self.ledger.join(who))
        elif NAMES[which] in self.known:
            self.nothing_changes(TakenError, lambda: self.ledger.join(who))
        elif len(self.known) == PLACES:
            self.nothing_changes(FullError, lambda: self.ledger.join(who))

    @rule(which=st.integers(0, 5))
    def the_connection_breaks(self, which: int) -> None:
        if found := self.member(which):
            name, process = found
            known = self.known[name]
            was_there = known["present"] and known["session"] == process["session"]
            assert self.ledger.away(process["session"]) == was_there
            known["present"] = known["present"] and not was_there

    @rule(which=st.integers(0, 5))
    def a_client_dies(self, which: int) -> None:
        """The server does not see it at once. What has no identity does not come back."""
        _, process = self.pick(which)
        process["session"] = ""
        if not process["identity"]:
            process["run"] = ""

    @rule(which=st.integers(0, 2))
    def the_server_sees_that_a_client_has_died(self, which: int) -> None:
        known = self.known.get(NAMES[which])
        sessions = [process["session"] for process in self.processes[NAMES[which]]]
        if known and known["present"] and known["session"] not in sessions:
            assert self.ledger.away(known["session"])
            known["present"] = False

    @rule(which=st.integers(0, 2))
    def a_lease_ends(self, which: int) -> None:
        known = self.known.get(NAMES[which])
        if known and not (known["present"] or known["left"] or known["lost"]):
            known["lost"] = self.account(NAMES[which]).lost = "did not come back"

    @rule(which=st.integers(0, 5))
    def leaves(self, which: int) -> None:
        """Once the server has learned of all that it sent."""
        if found := self.member(which):
            name, process = found
            known = self.known[name]
            if known["session"] == process["session"] and known["present"] and known["applied"] == LAST:
                known["left"] = self.account(name).left = True

    # ------------------------------------------------------------ what is sent

    @rule(which=st.integers(0, 5), count=st.integers(1, 4))
    def sends(self, which: int, count: int) -> None:
        if found := self.member(which):
            for _ in range(count):
                if found[1]["next"] <= LAST and self.arrive(*found, found[1]["next"]):
                    found[1]["next"] += 1

    @rule(which=st.integers(0, 5))
    def what_is_sent_never_arrives(self, which: int) -> None:
        if (found := self.member(which)) and found[1]["next"] <= LAST:
            name, process = found
            self.numbered[name] = max(self.numbered[name], process["next"])
            process["next"] += 1

    @rule(which=st.integers(0, 5), back=st.integers(1, 4))
    def arrives_twice(self, which: int, back: int) -> None:
        if (found := self.member(which)) and found[1]["next"] > back:
            self.arrive(*found, found[1]["next"] - back)

    @rule(which=st.integers(0, 5), ahead=st.integers(1, 3))
    def a_later_one_arrives_first(self, which: int, ahead: int) -> None:
        if (found := self.member(which)) and found[1]["next"] + ahead <= LAST:
            self.arrive(*found, found[1]["next"] + ahead)

    @rule(which=st.integers(0, 5))
    def a_number_comes_with_other_bytes(self, which: int) -> None:
        if (found := self.member(which)) and self.known[found[0]]["latest"]:
            self.arrive(*found, self.known[found[0]]["received"], digest=99)

    # ------------------------------------------------------------ the server

    @rule(which=st.integers(0, 2), count=st.integers(1, LAST))
    def the_server_learns(self, which: int, count: int) -> None:
        if NAMES[which] in self.known:
            self.learn(NAMES[which], count)

    @rule(which=st.integers(0, 2))
    def what_was_not_learned_from_is_given_back(self, which: int) -> None:
        if known := self.known.get(NAMES[which]):
            self.ledger.give_back(self.account(NAMES[which]))
            known["received"], known["latest"] = known["applied"], False
            self.lanes[NAMES[which]].clear()

    @rule()
    def a_checkpoint_is_made(self) -> None:
        if self.known:
            self.save()

    @precondition(lambda self: self.checkpoints)
    @rule(which=st.integers(0, 5), late=st.integers(0, 3))
    def a_client_throws_away_what_every_checkpoint_has(self, which: int, late: int) -> None:
        """late: what it is told has been true for a while."""
        name, process = self.pick(which)
        floor = self.checkpoints[0][1][0].get(name, {"applied": 0})["applied"]
        if process["run"]:
            process["durable"] = max(process["durable"], floor - late)

    @rule(damaged=st.sampled_from((0, 0, 1, 2)))
    def the_server_dies(self, damaged: int) -> None:
        self.start_anew(damaged)

    # ------------------------------------------------------------ what holds at every step

    @invariant()
    def the_ledger_is_as_the_model_has_it(self) -> None:
        assert [account.name for account in self.ledger.accounts] == list(self.known)
        assert self.ledger.duplicates == self.duplicates
        for name, known in self.known.items():
            account = self.account(name)
            assert vars(account) | {
                "name": name,
                "received": facts_of(account.received),
                "applied": facts_of(account.applied),
                "latest": account.latest is not None,
            } == {
                **{key: value for key, value in known.items() if key != "own"},
                "name": name,
                "identity": account.identity,
                "laid": account.laid,
                "lineage": known["own"],
                "fenced": {hashed(session) for session in known["fenced"]},
                "heard": account.heard,
                "received": MARKS[name][known["received"]],
                "applied": MARKS[name][known["applied"]],
            }

    @invariant()
    def what_was_learned_from_is_a_prefix_of_what_was_numbered(self) -> None:
        for name, trained in self.trained.items():
            applied = self.account(name).applied.sequence
            assert trained == list(range(1, applied + 1))
            assert applied <= self.account(name).received.sequence <= self.numbered[name]
            assert [mark.sequence for mark in self.lanes[name]] == list(
                range(applied + 1, self.account(name).received.sequence + 1)
            )

    @invariant()
    def what_a_checkpoint_might_need_is_still_with_its_client(self) -> None:
        for _, (known, _) in self.checkpoints:
            for name, then in known.items():
                assert all(process["durable"] <= then["applied"] for process in self.processes[name])

    @invariant()
    def only_the_last_session_counts(self) -> None:
        for name, known in self.known.items():
            for process in self.processes[name]:
                if not process["session"]:
                    continue
                its = known["present"] and process["session"] == known["session"]
                if its and not (known["left"] or known["lost"]):
                    assert self.ledger.account(process["session"]) is self.account(name)
                else:
                    fenced = process["session"] in known["fenced"]
                    with pytest.raises(RefusedError if fenced else StaleError):
                        self.ledger.account(process["session"])

    @invariant()
    def no_checkpoint_holds_a_secret(self) -> None:
        for text, _ in self.checkpoints[-1:]:
            for process in (process for each in self.processes.values() for process in each):
                assert not process["identity"] or process["identity"] not in text
                assert not process["session"] or process["session"] not in text

    def teardown(self) -> None:
        """Whatever has happened, who remains can come to the end; and then all is there, exactly once."""
        self.checkpoints = self.checkpoints[-1:]
        for name, known in list(self.known.items()):
            process = self.processes[name][-1]
            if known["left"] or known["lost"] or not process["identity"]:
                continue
            process |= {"session": "", "run": self.ledger.run_id}  # a new process, of the same folder
            self.join(name, process, takeover=True)
            assert process["durable"] < process["next"] == known["received"] + 1
            while process["next"] <= LAST:
                assert self.arrive(name, process, process["next"])
                process["next"] += 1
            self.learn(name, LAST)
            known["left"] = self.account(name).left = True
            assert facts_of(self.account(name).applied) == MARKS[name][LAST]
            assert self.account(name).applied.samples == sum(SIZES)
            assert self.trained[name] == list(range(1, LAST + 1))
        for check in (
            self.the_ledger_is_as_the_model_has_it,
            self.what_was_learned_from_is_a_prefix_of_what_was_numbered,
        ):
            check()


TestDeliveries = Deliveries.TestCase
TestDeliveries.settings = settings(
    max_examples=int(os.environ.get("DSL_F5_EXAMPLES", "1000")),
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
