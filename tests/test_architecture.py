"""The import arrows of docs/architecture.md, read from the source; and that what is generated is fresh."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("common", "dsl", "dsl_server", "dsl_client", "dsl_lab")
GENERATED = ("_pb2.py", "_pb2_grpc.py")


def modules(*folders: str) -> list[Path]:
    """Hand-written modules in these folders, from the root."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, folders
    return [path.relative_to(ROOT) for path in found if not path.name.endswith(GENERATED)]


def tree_of(module: Path) -> ast.Module:
    return ast.parse((ROOT / module).read_text(), str(module))


def imports_of(module: Path) -> Iterator[str]:
    """The dotted names that a module imports anywhere in it, also inside functions."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(module: Path, *forbidden: str) -> list[str]:
    """What the module imports of these packages."""
    return [
        name
        for name in imports_of(module)
        for root in forbidden
        if name == root or name.startswith(f"{root}.")
    ]


@pytest.mark.parametrize("module", modules("common"), ids=str)
def test_common_knows_neither_end(module: Path) -> None:
    assert imports(module, "dsl_server", "dsl_client", "dsl_lab") == []


@pytest.mark.parametrize("module", modules("common", "dsl_server", "dsl_client", "dsl_lab"), ids=str)
def test_nothing_knows_of_the_objects_for_python(module: Path) -> None:
    """They are made of both ends, and of the lab; none of these of them."""
    assert imports(module, "dsl") == []


@pytest.mark.parametrize("module", modules("common/methods", "common/nets", "common/codecs"), ids=str)
def test_methods_and_networks_know_no_wire_no_threads_no_files(module: Path) -> None:
    forbidden = ("grpc", "threading", "queue", "asyncio", "socket", "concurrent", "pathlib", "os")
    assert imports(module, *forbidden, "common.wire", "google.protobuf") == []


@pytest.mark.parametrize("module", modules("dsl_server"), ids=str)
def test_the_server_knows_no_client_and_no_data(module: Path) -> None:
    """That it cannot read images is privacy said as an absence."""
    assert imports(module, "dsl_client", "dsl_lab", "torchvision", "PIL") == []


@pytest.mark.parametrize("module", modules("dsl_client"), ids=str)
def test_the_client_knows_no_server(module: Path) -> None:
    assert imports(module, "dsl_server", "dsl_lab") == []


@pytest.mark.parametrize("module", modules("dsl_lab"), ids=str)
def test_the_lab_starts_both_ends_and_imports_neither(module: Path) -> None:
    assert imports(module, "dsl_server", "dsl_client") == []


@pytest.mark.parametrize("module", modules("common"), ids=str)
def test_common_reads_no_images(module: Path) -> None:
    assert imports(module, "torchvision", "PIL") == []


def test_grpc_is_known_only_where_a_wire_ends() -> None:
    knowing = {str(module) for module in modules(*PACKAGES) if imports(module, "grpc")}
    assert knowing == {
        "dsl_client/stream.py",
        "dsl_client/connection.py",
        "dsl_lab/ping.py",  # a stranger's calls, timed: dsl doctor
        "dsl_server/service.py",
        "dsl_server/server.py",
        "dsl_server/gate.py",
        "dsl_server/predictor.py",
        "dsl_lab/health.py",
    }


def test_torch_distributed_is_known_where_the_ranks_meet_and_where_weights_are_divided() -> None:
    knowing = {str(module) for module in modules(*PACKAGES) if imports(module, "torch.distributed")}
    assert knowing == {"dsl_server/ranks.py", "common/methods/divided.py"}


@pytest.mark.parametrize("module", ["dsl_server/ranks.py", "dsl_server/places.py", "dsl_server/ticks.py"])
def test_what_the_ranks_do_together_knows_no_wire(module: str) -> None:
    assert imports(Path(module), "grpc", "common.wire", "google.protobuf") == []


def test_describing_a_run_and_reading_its_results_do_not_wait_for_torch() -> None:
    code = "import sys, dsl; dsl.Run(); dsl.read; print(sorted({'torch', 'grpc'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_watchers_are_known_only_where_they_are_told() -> None:
    knowing = {
        str(module)
        for module in modules(*PACKAGES)
        if imports(module, "prometheus_client", "tensorboard", "torch.utils.tensorboard", "mlflow")
    }
    assert knowing == {
        "common/exporter.py",
        "dsl_server/metrics.py",
        "dsl_client/metrics.py",
        "dsl_server/trackers.py",
    }


@pytest.mark.parametrize("end", ["dsl_server", "dsl_client"])
def test_who_shows_a_run_knows_views_and_nothing_else_of_it(end: str) -> None:
    for name in ("terminal", "metrics"):
        known = [of for of in imports(Path(end, f"{name}.py"), end) if not of.startswith(f"{end}.watch.")]
        assert known == []


def test_ray_is_known_in_one_place() -> None:
    assert [str(module) for module in modules(*PACKAGES) if imports(module, "ray")] == ["dsl_lab/on_ray.py"]


def test_http_is_known_only_where_the_page_is() -> None:
    knowing = {str(module) for module in modules(*PACKAGES) if imports(module, "starlette", "uvicorn")}
    assert knowing == {"dsl_server/dashboard/app.py", "dsl_server/dashboard/serve.py"}


@pytest.mark.parametrize("module", modules("dsl_server/dashboard"), ids=str)
def test_the_page_knows_views_and_no_network(module: Path) -> None:
    assert imports(module, "torch", "grpc", "common.wire", "common.methods", "common.nets") == []


@pytest.mark.parametrize("program", ["dsl_server", "dsl_client", "dsl_lab"])
def test_help_does_not_wait_for_torch(program: str) -> None:
    heavy = {"torch", "grpc", "torchvision", "matplotlib.pyplot", "starlette", "uvicorn"}
    heavy |= {"tensorboard", "mlflow"}
    code = f"import sys, {program}.__main__; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_generated_stubs_are_those_of_the_protocol(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="grpcio-tools generates them")
    from tools.stubs import STUBS, generate

    generate(tmp_path)
    for name in STUBS:
        fresh, ours = (tmp_path / name).read_text(), (ROOT / "common/wire" / name).read_text()
        assert ours == fresh, f"common/wire/{name} is stale: run python tools/stubs.py"


def test_the_protocol_is_clean_by_buf() -> None:
    buf = shutil.which("buf", path=str(Path(sys.executable).parent))
    if buf is None:
        pytest.skip("buf (package buf-bin) is not installed here")
    done = subprocess.run([buf, "lint"], cwd=ROOT / "protos", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
