"""What each container's network interface counted, beside what the programs measured. Ends with 1 where they
differ by more than 3% in a direction in which the run sends batches.

    compare.py FOLDER     of <program>-<host>/{rx_bytes, tx_bytes, summary.json}, from docker/counted.sh

An interface counts everything: the headers of Ethernet, IP and TCP, acknowledgements, what was sent again,
look-ups of names. The meter counts messages as gRPC is handed them; the kernel, a connection's bytes. Where
hardly anything but acknowledgements travels, as down in DSL, there is nothing to compare.
"""

import json
import sys
from pathlib import Path

PERCENT = 3
WAYS = ("up", "down")
LITTLE = 0.01  # of the other direction's bytes: a direction that has less has acknowledgements


def main(folder: Path) -> int:
    containers = sorted(path for path in folder.iterdir() if path.is_dir())
    differ = False
    print(f"{'container':26} {'':4} {'interface':>13}{'meter':>14} {'of it':>7}{'kernel':>14} {'of it':>7}")
    for container in containers:
        summary = json.loads((container / "summary.json").read_text())
        server = container.name.startswith("serve")
        meter = {way: sum(summary["wire"][way].values()) for way in WAYS}
        kernel: dict[str, int] = summary["wire"].get("socket") or {}  # the server's alone
        for way in WAYS:
            counter = "rx_bytes" if server == (way == "up") else "tx_bytes"
            interface = int((container / counter).read_text())
            counts = [meter[way], *([kernel[way]] if kernel else [])]
            said = "".join(f"{count:14,} {count / interface:7.4f}" for count in counts)
            if meter[way] < LITTLE * max(meter.values()):
                said += "  acknowledgements"
            elif any(100 * abs(count - interface) > PERCENT * interface for count in counts):
                differ = True
                said += "  DIFFERS"
            print(f"{container.name:26} {way:4} {interface:13,}{said}")
    return 1 if differ or not containers else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
