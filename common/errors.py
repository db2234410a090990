"""Every error that this project raises on purpose, drawn as one tree.

* SplitLearningError
  - ConfigError        what the user asked for cannot be done; the message says what can
    + OwnCodeError     since code of the user's own failed, whose words the other end is not told
  - WireError          what the other end sent breaks the protocol (INVALID_ARGUMENT)
    + SequenceError    a batch came out of order (ABORTED); it carries the number that was due
    + DigestError      its bytes are not those that were sent (DATA_LOSS)
    + PlanError        a batch came that the run has no place for (OUT_OF_RANGE)
  - ClosedError        the other end, or the run, is over; the message says why
    + StaleError       the membership is, or the server is about to be: join again (UNAVAILABLE)
      * LostRankError  because a process of the server was lost, and all begin anew (UNAVAILABLE)
    + RefusedError     the server would not have this client (FAILED_PRECONDITION)
      * FullError      because it has all it was asked to have (RESOURCE_EXHAUSTED)
      * TakenError     because one of that identity has had a place (ALREADY_EXISTS)
      * IdentityError  because one end does not know, or trust, who the other is (UNAUTHENTICATED)
      * ForbiddenError because it is not who it claims to be (PERMISSION_DENIED)
      * ConflictError  because it gave one batch's number to another (FAILED_PRECONDITION)
  - StepError          a training step failed: the run cannot go on
    + NonFiniteError   because what it came to is not finite; where the run says so it is left out

Programs end with `exit_code` of the error that ended them (sysexits.h where it has a fitting one).
"""


class SplitLearningError(Exception):
    """Base of them all. Its text is one line for a person: the value and the remedy."""

    exit_code = 1

    @property
    def told(self) -> str:
        """What the other end hears of it."""
        return str(self)


class ConfigError(SplitLearningError):
    """What the user asked for cannot be done."""

    exit_code = 2


class OwnCodeError(ConfigError):
    """Code of the user's own failed. What it said may be about the data: it stays here.

    what: was being done. words: of the error, a line.
    """

    def __init__(self, what: str, error: Exception, words: str) -> None:
        self._told = f"{what}: its code failed: {type(error).__name__}"
        super().__init__(f"{self._told}: {words}")

    @property
    def told(self) -> str:
        return self._told


class WireError(SplitLearningError):
    """What the other end sent breaks the protocol."""

    exit_code = 65  # EX_DATAERR


class SequenceError(WireError):
    """A batch came out of order.

    expected: the sequence number that was due.
    """

    def __init__(self, message: str, expected: int) -> None:
        super().__init__(message)
        self.expected = expected


class DigestError(WireError):
    """What came is not what was sent."""


class PlanError(WireError):
    """A batch came when all of its client's epochs had come to their end."""


class ClosedError(SplitLearningError):
    """The other end, or the run, is over."""

    exit_code = 69  # EX_UNAVAILABLE


class StaleError(ClosedError):
    """The membership is over, or the server is about to be; who can come back does."""


class LostRankError(StaleError):
    """A process of the server, one of its ranks, is gone: the others cannot go on without it."""


class RefusedError(ClosedError):
    """The server would not have this client."""

    exit_code = 77  # EX_NOPERM


class FullError(RefusedError):
    """The server has all the clients that it was asked to have."""


class TakenError(RefusedError):
    """One of this identity has, or had, a place in the run."""


class IdentityError(RefusedError):
    """One end does not know, or does not trust, who the other is."""


class ForbiddenError(RefusedError):
    """The client is not who it claims to be."""


class ConflictError(RefusedError):
    """The client gave the number of one batch to another."""


class StepError(SplitLearningError):
    """A training step failed: the run cannot go on."""

    exit_code = 70  # EX_SOFTWARE


class NonFiniteError(StepError):
    """A step came to a loss, gradients or weights that are not finite."""
