"""What docker/ and kubernetes/ have, judged without either: by the schemas of the specifications, by the
programs whose flags stand there, and by calling the scripts. The containers themselves: docker/test.sh.
"""

import functools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from dsl_lab.launch import program

yaml = pytest.importorskip("yaml", reason="comes with kubernetes-validate")
pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).parent.parent
DOCKER, KUBERNETES = ROOT / "docker", ROOT / "kubernetes"
COMPOSE = sorted(DOCKER.glob("compose*.yaml"))
SCRIPTS = sorted(DOCKER.glob("*.sh"))
OVERLAYS = ["base", "overlays/tls", "overlays/edge"]
RANKS = "overlays/ranks"  # whose server is a Job


def told(*command: object, **more: Any) -> tuple[int, str]:
    """How a command ends, and all that it says."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=50, check=False, **more
    )
    return done.returncode, done.stdout + done.stderr


def tool(name: str) -> str:
    """A program of the virtual environment, or of the machine."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed here")
    return found


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def kustomized(overlay: str) -> list[dict[str, Any]]:
    code, said = told(tool("kubectl"), "kustomize", KUBERNETES / overlay)
    assert code == 0, said
    return list(yaml.safe_load_all(said))


def one(resources: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = (resource for resource in resources if resource["kind"] == kind)
    return found


def container(resource: dict[str, Any]) -> dict[str, Any]:
    (found,) = resource["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


# Docker


def test_the_dockerfile_is_clean_by_hadolint() -> None:
    assert told(tool("hadolint"), DOCKER / "Dockerfile") == (0, "")


def test_the_build_s_context_has_the_packages_and_no_secrets() -> None:
    lines = set((ROOT / ".dockerignore").read_text().splitlines())
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    packages = build["targets"]["wheel"]["packages"]
    assert {f"!{package}" for package in packages} <= lines
    assert "*" in lines, "what is not named stays out: certificates, runs, the repository"


@pytest.mark.parametrize("file", COMPOSE, ids=lambda file: file.name)
def test_compose_files_follow_the_specification(file: Path) -> None:
    code, said = told(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", file)
    assert code == 0, said


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_shell_and_may_be_started(script: Path) -> None:
    shell = re.match(r"#!(?:/usr)?/bin/(?:env )?(\w+)", script.read_text())
    assert shell
    assert told(shell[1], "-n", script) == (0, "")
    assert os.access(script, os.X_OK)


def words(command: str) -> list[str]:
    """A compose file's command as a shell's words, each variable at its default."""
    return shlex.split(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", command))


@pytest.mark.parametrize("file", ["compose.yaml", "compose.tls.yaml"])
def test_the_programs_know_the_flags_of_the_compose_files(file: str) -> None:
    services = documents(DOCKER / file)[0]["services"]
    code, said = told(program("dsl-server"), *words(services["server"]["command"]), "--print-config")
    assert code == 0, said
    assert "clients = 3" in said
    assert "checkpoint_every = 30.0" in said
    code, said = told(program("dsl-client"), *words(services["client"]["command"]), "--help")
    assert code == 0, said


@pytest.fixture
def serve(tmp_path: Path) -> Any:
    """Calls serve.sh beside a dsl-server, and a sleep, that only say how they were called."""
    for name in ("dsl-server", "sleep"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    run = tmp_path / "run"
    run.mkdir()

    def call(*files: str, **environment: str) -> tuple[int, str]:
        for file in files:
            (run / file).touch()
        path = f"{tmp_path}:{os.environ['PATH']}"
        code, said = told(
            DOCKER / "serve.sh", "--clients", "3", env={"PATH": path, "RUN_FOLDER": str(run), **environment}
        )
        return code, said.replace(str(run), "RUN").strip()

    return call


def test_a_container_begins_a_run_goes_on_with_it_and_lets_it_be(serve: Any) -> None:
    assert serve() == (0, "dsl-server --clients 3 --out RUN")
    assert serve("run.json") == (0, "dsl-server --clients 3 --resume RUN")
    assert serve("summary.json") == (0, "the run in RUN is over")
    assert serve(AFTERWARDS="stay") == (0, "the run in RUN is over\nsleep infinity")


@pytest.fixture
def ranks(tmp_path: Path) -> Any:
    """Calls ranks.sh as in the pod of an index, with a dsl-server that only meets the others."""
    (tmp_path / "dsl-server").write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        "if '--wrong' in sys.argv:\n"
        "    sys.exit(2)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import torch\n"
        "from dsl_server.ranks import Ranks\n"
        "ranks = Ranks.met(torch.device('cpu'), 30.0)\n"
        "print(ranks.rank, ranks.size, *sys.argv[1:])\n"
        "ranks.end()\n"
    )
    (tmp_path / "dsl-server").chmod(0o755)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    called: list[subprocess.Popen[str]] = []

    def call(index: int, *flags: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "JOB_COMPLETION_INDEX": str(index),
            "RANKS": "2",
            "MEETING": f"127.0.0.1:{port}",
            "RUN_FOLDER": str(tmp_path / f"{index}" / "run"),
            "FIRST_FOLDER": str(tmp_path / "0" / "run"),
        }
        called.append(
            subprocess.Popen(
                [DOCKER / "ranks.sh", *flags],
                env=environment,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return called[-1]

    yield call
    for process in called:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_a_pod_s_index_is_its_rank_whoever_comes_first(ranks: Any, tmp_path: Path) -> None:
    late = [ranks(1, "--epochs", "3"), ranks(0, "--epochs", "3")]
    for index, process in zip((1, 0), late, strict=True):
        said, _ = process.communicate(timeout=50)
        assert process.returncode == 0, said
        folder = tmp_path / str(index) / "run"
        assert said.splitlines()[-1] == f"{index} 2 --epochs 3 --resume {folder}"


def test_a_rank_of_a_run_that_is_over_ends_and_wrong_settings_end_with_2(ranks: Any, tmp_path: Path) -> None:
    wrong = ranks(1, "--wrong")
    assert (wrong.communicate(timeout=20)[0], wrong.returncode) == ("", 2)
    (tmp_path / "0" / "run").mkdir(parents=True)
    (tmp_path / "0" / "run" / "summary.json").touch()
    over = ranks(1)
    assert (over.communicate(timeout=20)[0], over.returncode) == (
        f"the run in {tmp_path / '1' / 'run'} is over\n",
        0,
    )


def test_counts_that_differ_by_more_than_3_percent_are_told_of(tmp_path: Path) -> None:
    def compared(received: int) -> tuple[int, list[str]]:
        folder = tmp_path / f"serve-{received}" / "serve-one"
        folder.mkdir(parents=True)
        up, down = {"activations": 900, "labels": 70}, {"control": 2}
        wire = {"up": up, "down": down, "socket": {"up": 980, "down": 30}}
        (folder / "summary.json").write_text(json.dumps({"wire": wire}))
        (folder / "rx_bytes").write_text(f"{received}\n")
        (folder / "tx_bytes").write_text("90\n")
        code, said = told(sys.executable, DOCKER / "compare.py", folder.parent)
        return code, said.splitlines()[1:]

    code, (up, down) = compared(1000)
    assert code == 0
    assert up.split() == ["serve-one", "up", "1,000", "970", "0.9700", "980", "0.9800"]
    assert down.split() == ["serve-one", "down", "90", "2", "0.0222", "30", "0.3333", "acknowledgements"]
    code, (up, _) = compared(1001)
    assert code == 1
    assert up.endswith("DIFFERS")
    assert told(sys.executable, DOCKER / "compare.py", tmp_path / "serve-1000" / "serve-one")[0] == 1, (
        "no containers"
    )


# Kubernetes


def validated(manifests: Path) -> None:
    code, said = told(tool("kubernetes-validate"), "--strict", "--quiet", manifests)
    assert code == 0, said


@pytest.mark.parametrize(
    "manifests",
    [
        *(KUBERNETES / "base" / name for name in ("server.yaml", "clients.yaml", "network.yaml")),
        KUBERNETES / "components" / "ranks" / "ranks.yaml",
    ],
)
def test_manifests_are_kubernetes_own(manifests: Path) -> None:
    validated(manifests)


@pytest.mark.parametrize("overlay", [*OVERLAYS, RANKS])
def test_overlays_come_to_kubernetes_own(overlay: str, tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(kustomized(overlay)))
    validated(tmp_path / "all.yaml")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_programs_know_the_flags_of_the_manifests(overlay: str) -> None:
    resources = kustomized(overlay)
    config = str(KUBERNETES / "base" / "run.toml")
    flags = [
        flag.replace("/config/run.toml", config) for flag in container(one(resources, "StatefulSet"))["args"]
    ]
    code, said = told(program("dsl-server"), *flags, "--print-config")
    assert code == 0, said
    if overlay == "overlays/edge":
        assert not [resource for resource in resources if resource["kind"] == "Job"]
        return
    job = one(resources, "Job")
    code, told_of_client = told(program("dsl-client"), *container(job)["args"], "--help")
    assert code == 0, told_of_client
    assert f"clients = {job['spec']['completions']}\n" in said, "the Job has as many as the run waits for"
    assert job["spec"]["completions"] == job["spec"]["parallelism"]


@pytest.mark.parametrize("overlay", [*OVERLAYS, RANKS])
def test_every_container_is_confined(overlay: str) -> None:
    pods = [r["spec"]["template"]["spec"] for r in kustomized(overlay) if r["kind"] in ("StatefulSet", "Job")]
    assert pods
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for each in [*pod["containers"], *pod.get("initContainers", [])]:
            confined = {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert each["securityContext"] == confined
            assert {"cpu", "memory"} <= set(each["resources"]["requests"])
            assert "memory" in each["resources"]["limits"]


@pytest.fixture(scope="module")
def known_to_health() -> str:
    return told(program("dsl"), "health", "--help")[1]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_speak_as_the_server_does(overlay: str, known_to_health: str) -> None:
    """With certificates wherever the server has them; a gRPC probe could not."""
    server = container(one(kustomized(overlay), "StatefulSet"))
    secured = "--certs=/certs" in server["args"]
    assert secured != ("--insecure" in server["args"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        command = " ".join(server[probe]["exec"]["command"])
        asks = command[command.index("dsl health") :].split()
        assert ("--certs" in asks) is secured, probe
        assert all(flag in known_to_health for flag in asks if flag.startswith("--"))


# A server of several ranks


@functools.cache
def of_ranks() -> list[dict[str, Any]]:
    return kustomized(RANKS)


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = (r for r in of_ranks() if (r["kind"], r["metadata"]["name"]) == (kind, name))
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def rank() -> dict[str, Any]:
    """The Job of the ranks: its spec, its pod's, its container, and that one's environment."""
    job = named("Job", "dsl-server")
    spec, server = job["spec"], container(job)
    told = {variable["name"]: variable.get("value", "") for variable in server["env"]}
    return {"job": spec, "pod": spec["template"]["spec"], "server": server, "told": told}


def test_the_numbers_of_the_ranks_agree(rank: dict[str, Any]) -> None:
    assert not [resource for resource in of_ranks() if resource["kind"] == "StatefulSet"]
    ranks = int(rank["told"]["RANKS"])
    assert rank["job"]["completionMode"] == "Indexed"
    assert rank["job"]["completions"] == rank["job"]["parallelism"] == ranks
    budget = named("PodDisruptionBudget", "dsl-server")["spec"]
    assert budget["minAvailable"] == ranks
    assert "maxUnavailable" not in budget, "of the two there may be one"


def test_the_ranks_meet_and_are_found_by_names_that_there_are(rank: dict[str, Any]) -> None:
    domain = rank["pod"]["subdomain"]
    names = named("Service", domain)["spec"]
    assert (names["clusterIP"], names["publishNotReadyAddresses"]) == ("None", True)
    assert names["selector"].items() <= rank["job"]["template"]["metadata"]["labels"].items()
    each = f"dsl-server-$(JOB_COMPLETION_INDEX).{domain}"
    ports = {port["name"]: port["containerPort"] for port in rank["server"]["ports"]}
    assert f"--advertise={each}:{ports['grpc']}" in rank["server"]["args"]
    assert rank["told"]["MEETING"] == f"dsl-server-0.{domain}:{ports['meeting']}"
    assert {port["port"] for port in names["ports"]} == {ports["grpc"], ports["meeting"]}
    for probe in ("startupProbe", "readinessProbe"):
        assert rank["server"][probe]["grpc"] == {"port": ports["grpc"]}


def test_clients_ask_any_rank_and_ranks_reach_each_other(rank: dict[str, Any]) -> None:
    labels = rank["job"]["template"]["metadata"]["labels"].items()
    assert named("Service", "dsl-server")["spec"]["selector"].items() <= labels
    assert "--server=dsl-server:50051" in container(named("Job", "dsl-clients"))["args"]
    policy = named("NetworkPolicy", "dsl-ranks")["spec"]
    to_each_other = [{"podSelector": {"matchLabels": {"app.kubernetes.io/component": "server"}}}]
    assert policy["podSelector"]["matchLabels"].items() <= labels
    assert policy["ingress"] == [{"from": to_each_other}]
    assert {"to": to_each_other} in policy["egress"], "at any port: gloo and NCCL choose theirs"


def test_a_lost_rank_is_replaced_and_wrong_settings_are_not_tried_again(rank: dict[str, Any]) -> None:
    assert rank["pod"]["restartPolicy"] == "Never", "a podFailurePolicy asks for it"
    wrong, given_up = rank["job"]["podFailurePolicy"]["rules"]
    assert wrong == {
        "action": "FailJob",
        "onExitCodes": {"containerName": rank["server"]["name"], "operator": "In", "values": [2]},
    }
    assert given_up["action"] == "Ignore"
    assert rank["job"]["backoffLimit"] >= 4 * rank["job"]["completions"]


def test_every_rank_has_a_folder_and_sees_whether_the_run_is_over(rank: dict[str, Any]) -> None:
    mounts = {mount["mountPath"]: mount for mount in rank["server"]["volumeMounts"]}
    assert mounts["/runs"]["subPathExpr"] == "$(JOB_COMPLETION_INDEX)"
    assert (mounts["/first"]["subPath"], mounts["/first"]["readOnly"]) == ("0", True)
    assert mounts["/runs"]["name"] == mounts["/first"]["name"]
    assert (rank["told"]["RUN_FOLDER"], rank["told"]["FIRST_FOLDER"]) == ("/runs/run", "/first/run")
    (claim,) = (
        v["persistentVolumeClaim"]["claimName"] for v in rank["pod"]["volumes"] if v["name"] == "runs"
    )
    assert named("PersistentVolumeClaim", claim)


def test_the_server_knows_the_flags_of_its_ranks(rank: dict[str, Any]) -> None:
    if "--advertise" not in told(program("dsl-server"), "--help")[1]:
        pytest.skip("this dsl-server is of one rank")
    config = str(KUBERNETES / "base" / "run.toml")
    flags = [flag.replace("/config/run.toml", config) for flag in rank["server"]["args"]]
    code, said = told(program("dsl-server"), *flags, "--resume", "somewhere", "--print-config")
    assert code == 0, said
    assert f"clients = {named('Job', 'dsl-clients')['spec']['completions']}\n" in said


def test_each_rank_may_have_a_gpu(tmp_path: Path) -> None:
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../base"],
        "components": ["../components/ranks", "../components/gpu"],
    }
    shutil.copytree(KUBERNETES, tmp_path / "kubernetes")
    folder = tmp_path / "kubernetes" / "mine"
    folder.mkdir()
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    code, said = told(tool("kubectl"), "kustomize", folder)
    assert code == 0, said
    (job,) = (
        r for r in yaml.safe_load_all(said) if (r["kind"], r["metadata"]["name"]) == ("Job", "dsl-server")
    )
    assert container(job)["image"] == "dsl-server:0.1.0-cuda"
    assert container(job)["args"][-1] == "--device=cuda"
    assert container(job)["resources"]["limits"]["nvidia.com/gpu"] == 1
