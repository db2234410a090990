"""Runs the pods of an overlay of kubernetes/, tls or ranks, as containers of Docker, for want of a cluster:
their users, files, init containers, arguments and probes, as the manifests say. What only a cluster does is
not shown: policies, volumes that move, restarts.

    pods.py MANIFESTS     of `kubectl kustomize kubernetes/overlays/tls` and of kubernetes/secrets.sh,
                          or of `kubectl kustomize kubernetes/overlays/ranks`

A server of several ranks loses one on the way; then all of them are started again, as their Job does. A
Secret's files are as the kubelet makes them where a pod has an fsGroup: root's, and readable to the group.
"""

import base64
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

NETWORK = "dsl-test-pods"
PATIENCE_S = 300
SERVER, RANKS, CLIENTS = ("StatefulSet", "dsl-server"), ("Job", "dsl-server"), ("Job", "dsl-clients")
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")

Manifest = dict[str, Any]


def docker(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["docker", *map(str, arguments)], capture_output=True, text=True, check=False)
    if check and done.returncode:
        sys.exit(f"docker {' '.join(map(str, arguments))}: {done.stdout}{done.stderr}")
    return done


class Pod:
    """A template's containers with their volumes, under names that the others know it by."""

    def __init__(
        self, name: str, spec: Manifest, resources: list[Manifest], folder: Path, *names: str
    ) -> None:
        self.name, self._spec, self._index = f"{NETWORK}-{name}", spec, name.rpartition("-")[2]
        self._names = (name, *names)
        (self.container,) = spec["containers"]
        self._context = spec["securityContext"]
        self._volumes = {"runs": self._owned(folder / name / "runs")}
        for volume in spec["volumes"]:
            self._volumes[volume["name"]] = self._made(volume, resources, folder / name)

    def start(self) -> None:
        for number, init in enumerate(self._spec.get("initContainers", [])):
            self._run(init, f"{self.name}-init-{number}", "--rm")
        known = [flag for name in self._names for flag in ("--network-alias", name)]
        where = ("--detach", "--hostname", self._names[0], "--network", NETWORK, *known)
        self._run(self.container, self.name, *where)

    def probe(self, which: str) -> bool:
        """A gRPC probe is asked from within, by the same call of the same service."""
        asked = self.container[which]
        called = ["dsl", "health", "--server", f"localhost:{asked.get('grpc', {}).get('port')}"]
        return self.told(*(asked["exec"]["command"] if "exec" in asked else called))

    def told(self, *command: str) -> bool:
        """Whether the command, in the container, ends with 0."""
        return docker("exec", self.name, *command, check=False).returncode == 0

    def exit_code(self) -> int | None:
        """None while it runs."""
        state = docker("inspect", "--format", "{{.State.Running}} {{.State.ExitCode}}", self.name)
        running, code = state.stdout.split()
        return None if running == "true" else int(code)

    def _run(self, container: Manifest, name: str, *how: str) -> None:
        confined = container["securityContext"]
        assert confined["readOnlyRootFilesystem"], "as the test of the manifests says"
        flags = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
        flags += ["--user", f"{self._context['runAsUser']}:{self._context['runAsGroup']}"]
        for variable in container.get("env", []):
            value = self._expanded(variable.get("value", self._index))
            flags += ["--env", f"{variable['name']}={value}"]
        for mount in container["volumeMounts"]:
            within = self._expanded(mount.get("subPathExpr", mount.get("subPath", "")))
            source = self._volumes[mount["name"]] / within
            if not source.exists():
                self._owned(source)
            flags += ["--volume", f"{source}:{mount['mountPath']}{':ro' if mount.get('readOnly') else ''}"]
        arguments = [self._expanded(argument) for argument in container.get("args", [])]
        if command := container.get("command"):
            flags, arguments = [*flags, "--entrypoint", command[0]], [*command[1:], *arguments]
        image = f"{container['image'].partition(':')[0]}:test"
        docker("run", "--name", name, *how, *flags, image, *arguments)

    def _expanded(self, text: str) -> str:
        return text.replace("$(JOB_COMPLETION_INDEX)", self._index)

    def _made(self, volume: Manifest, resources: list[Manifest], folder: Path) -> Path:
        if claim := volume.get("persistentVolumeClaim"):  # of all pods one
            shared = folder.parent / "claims" / claim["claimName"]
            return shared if shared.exists() else self._owned(shared)
        path = self._owned(folder / volume["name"])
        if config := volume.get("configMap"):
            for name, text in _named("ConfigMap", config["name"], resources)["data"].items():
                (path / name).write_text(text)
        if secret := volume.get("secret"):
            data = _named("Secret", secret["secretName"], resources)["data"]
            for item in secret.get("items", [{"key": key, "path": key} for key in data]):
                file = path / item["path"]
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(base64.b64decode(data[item["key"]]))
                os.chown(file, 0, self._context["fsGroup"])
                file.chmod(secret["defaultMode"])
        return path

    def _owned(self, path: Path) -> Path:
        """As an emptyDir is: of root, and of the pod's group, which may write."""
        path.mkdir(parents=True)
        os.chown(path, 0, self._context["fsGroup"])
        path.chmod(0o2775)
        return path


def _named(kind: str, name: str, resources: list[Manifest]) -> Manifest:
    (found,) = (r for r in resources if (r["kind"], r["metadata"]["name"]) == (kind, name))
    return found


def wait_for(what: str, holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > end:
            sys.exit(f"after {PATIENCE_S} s still not: {what}")
        time.sleep(1)
    print(what)


def is_of_ranks(resources: list[Manifest]) -> bool:
    return any((r["kind"], r["metadata"]["name"]) == RANKS for r in resources)


@contextlib.contextmanager
def pods(resources: list[Manifest]) -> Iterator[tuple[list[Pod], list[Pod]]]:
    """The server's and the clients', made and not started; all gone at the end."""
    job = _named(*CLIENTS, resources)["spec"]
    with tempfile.TemporaryDirectory() as folder:
        servers = _servers(resources, Path(folder))
        clients = [
            Pod(f"client-{index}", job["template"]["spec"], resources, Path(folder))
            for index in range(job["completions"])
        ]
        docker("network", "create", NETWORK)
        try:
            yield servers, clients
        except BaseException:
            for pod in (*servers, *clients):
                print(docker("logs", "--tail", "5", pod.name, check=False).stderr)
            raise
        finally:
            docker("rm", "--force", *(pod.name for pod in (*servers, *clients)), check=False)
            docker("network", "rm", NETWORK, check=False)


def _servers(resources: list[Manifest], folder: Path) -> list[Pod]:
    """The server, or its ranks, each by its own name and by that of the service that has all."""
    if not is_of_ranks(resources):
        return [Pod("dsl-server", _named(*SERVER, resources)["spec"]["template"]["spec"], resources, folder)]
    job = _named(*RANKS, resources)["spec"]
    spec = job["template"]["spec"]
    return [
        Pod(name, spec, resources, folder, f"{name}.{spec['subdomain']}", "dsl-server")
        for name in (f"dsl-server-{rank}" for rank in range(job["completions"]))
    ]


def main(manifests: Path) -> None:
    resources = list(yaml.safe_load_all(manifests.read_text()))
    with pods(resources) as (servers, clients):
        for server in reversed(servers):  # the first rank, at which they meet, comes last
            server.start()
        for probe in PROBES:
            for server in servers:
                wait_for(
                    f"{server.name} passes its {probe}",
                    lambda server=server, probe=probe: server.probe(probe),
                )
        for client in clients:
            client.start()
        if is_of_ranks(resources):
            lose_one(servers)
        codes = [*ended(clients), *ended(servers)]
        if any(codes):
            sys.exit(f"they ended with {codes}")
        if not is_of_ranks(resources):
            stays(servers[0])
        print(docker("logs", "--tail", "1", servers[0].name).stdout.strip())


def ended(some: list[Pod]) -> list[int | None]:
    for pod in some:
        wait_for(f"{pod.name} ended", lambda pod=pod: pod.exit_code() is not None)
    return [pod.exit_code() for pod in some]


def lose_one(ranks: list[Pod]) -> None:
    """When there is a checkpoint, the last one: then none goes on alone, and all are started again."""
    wait_for("there is a checkpoint", lambda: ranks[0].told("sh", "-c", "ls /runs/run/checkpoints/*"))
    docker("kill", ranks[-1].name)
    codes = ended(ranks)
    if not all(codes):
        sys.exit(f"a rank was killed, and they ended with {codes}")
    for rank in reversed(ranks):
        docker("start", rank.name)


def stays(server: Pod) -> None:
    """Started again, as a StatefulSet does it."""
    docker("start", server.name)
    wait_for("the server stays, alive", lambda: server.probe("livenessProbe"))
    if server.probe("readinessProbe"):
        sys.exit("of a run that is over the server is ready")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
