"""What tests of waiting share: something done meanwhile, and whether it still waits."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

# Of gRPC: a channel that is closed soon after it was waited for is still polled once.
POLLED = "ignore::pytest.PytestUnhandledThreadExceptionWarning"


def in_thread(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """What the function comes to, meanwhile. A thread that hangs does not keep the tests from ending."""
    result: Future[Any] = Future()

    def body() -> None:
        try:
            result.set_result(function(*arguments))
        except BaseException as error:  # noqa: BLE001  # told to whom asks for the result
            result.set_exception(error)

    threading.Thread(target=body, daemon=True).start()
    return result


def waits(result: Future[Any], seconds: float = 0.1) -> bool:
    """Whether it is still waiting a moment later."""
    try:
        result.exception(timeout=seconds)
    except TimeoutError:
        return True
    return False


def wait_for(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Until it holds. Raises AssertionError if it does not in a time that is ample."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that in time")
