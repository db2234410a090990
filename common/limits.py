"""How much the machine lets a process have."""

import resource
import sys


def allow_files(needed: int) -> int:
    """Lets this process have so many files open at a time, as far as it may; how many that is at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < needed <= most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    return most
