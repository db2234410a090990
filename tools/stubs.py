"""Generates the wire's Python stubs from protos/ into common/wire/ (or into the folder given)."""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROTOCOLS = ("split_learning", "prediction")
STUBS = tuple(f"{name}_pb2{end}" for name in PROTOCOLS for end in (".py", ".pyi", "_grpc.py"))


def generate(out: Path) -> None:
    """Writes the stub files, with imports that fit their place in common.wire."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        sources = [str(ROOT / f"protos/dsl/v1/{name}.proto") for name in PROTOCOLS]
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}", *flags, *sources]
        subprocess.run(command, check=True)
        for name in STUBS:
            text = (Path(folder) / "dsl/v1" / name).read_text()
            (out / name).write_text(text.replace("from dsl.v1 import", "from common.wire import"))


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "common/wire")
