"""What is shipped: the packages, their type marker, the licence and the sample, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_ships_the_packages_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packages = {"common", "dsl", "dsl_server", "dsl_client", "dsl_lab"}
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == packages
    assert {f"{package}/py.typed" for package in packages} <= set(names)
    assert {"dsl_client/sample/fashion-mnist.npz.xz", "dsl_client/sample/NOTICE"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    kinds = {Path(name).suffix for name in names if name.split("/")[0] in packages}
    assert kinds <= {".py", ".pyi", ".typed", ".css", ".html", ".js", ".svg", ".xz", ""}
    page = {path.relative_to(ROOT).as_posix() for path in (ROOT / "dsl_server/dashboard/static").rglob("*.*")}
    assert {"dsl_server/dashboard/static/page.html"} < page <= set(names)
    assert wheel.stat().st_size < 6e6
