"""Runs the pods of kubernetes/overlays/tls as containers of Docker, for want of a cluster: their users,
files, init containers, arguments and probes, as the manifests say. What only a cluster does is not shown:
policies, volumes that move, restarts.

    pods.py MANIFESTS     of `kubectl kustomize kubernetes/overlays/tls` and of kubernetes/secrets.sh

A Secret's files are as the kubelet makes them where a pod has an fsGroup: root's, and readable to the group.
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
SERVER, CLIENTS = ("StatefulSet", "dsl-server"), ("Job", "dsl-clients")

Manifest = dict[str, Any]


def docker(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["docker", *map(str, arguments)], capture_output=True, text=True, check=False)
    if check and done.returncode:
        sys.exit(f"docker {' '.join(map(str, arguments))}: {done.stdout}{done.stderr}")
    return done


class Pod:
    """A template's containers with their volumes, under a name that the others know it by."""

    def __init__(self, name: str, spec: Manifest, resources: list[Manifest], folder: Path) -> None:
        self.name, self._spec, self._index = f"{NETWORK}-{name}", spec, name.rpartition("-")[2]
        self._host = name
        (self.container,) = spec["containers"]
        self._context = spec["securityContext"]
        self._volumes = {"runs": self._owned(folder / name / "runs")}
        for volume in spec["volumes"]:
            self._volumes[volume["name"]] = self._made(volume, resources, folder / name)

    def start(self) -> None:
        for number, init in enumerate(self._spec.get("initContainers", [])):
            self._run(init, f"{self.name}-init-{number}", "--rm")
        self._run(self.container, self.name, "--detach", "--network", NETWORK, "--network-alias", self._host)

    def probe(self, which: str) -> bool:
        command = self.container[which]["exec"]["command"]
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
            flags += ["--env", f"{variable['name']}={variable.get('value', self._index)}"]
        for mount in container["volumeMounts"]:
            source = self._volumes[mount["name"]] / self._expanded(mount.get("subPathExpr", ""))
            flags += ["--volume", f"{source}:{mount['mountPath']}{':ro' if mount.get('readOnly') else ''}"]
        arguments = [self._expanded(argument) for argument in container.get("args", [])]
        if command := container.get("command"):
            flags, arguments = [*flags, "--entrypoint", command[0]], [*command[1:], *arguments]
        image = f"{container['image'].partition(':')[0]}:test"
        docker("run", "--name", name, *how, *flags, image, *arguments)

    def _expanded(self, text: str) -> str:
        return text.replace("$(JOB_COMPLETION_INDEX)", self._index)

    def _made(self, volume: Manifest, resources: list[Manifest], folder: Path) -> Path:
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


@contextlib.contextmanager
def pods(resources: list[Manifest]) -> Iterator[tuple[Pod, list[Pod]]]:
    """The server's and the clients', made and not started; all gone at the end."""
    server_spec, job = (_named(*which, resources)["spec"] for which in (SERVER, CLIENTS))
    with tempfile.TemporaryDirectory() as folder:
        server = Pod("dsl-server", server_spec["template"]["spec"], resources, Path(folder))
        clients = [
            Pod(f"client-{index}", job["template"]["spec"], resources, Path(folder))
            for index in range(job["completions"])
        ]
        docker("network", "create", NETWORK)
        try:
            yield server, clients
        except BaseException:
            for pod in (server, *clients):
                print(docker("logs", "--tail", "5", pod.name, check=False).stderr)
            raise
        finally:
            docker("rm", "--force", *(pod.name for pod in (server, *clients)), check=False)
            docker("network", "rm", NETWORK, check=False)


def main(manifests: Path) -> None:
    with pods(list(yaml.safe_load_all(manifests.read_text()))) as (server, clients):
        server.start()
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            wait_for(f"the server passes its {probe}", lambda probe=probe: server.probe(probe))
        for client in clients:
            client.start()
        for client in clients:
            wait_for(f"{client.name} ended", lambda client=client: client.exit_code() is not None)
        codes = [client.exit_code() for client in clients]
        wait_for("the server ended", lambda: server.exit_code() is not None)
        codes.append(server.exit_code())
        if any(codes):
            sys.exit(f"they ended with {codes}")
        docker("start", server.name)  # as a StatefulSet does
        wait_for("the server stays, alive", lambda: server.probe("livenessProbe"))
        if server.probe("readinessProbe"):
            sys.exit("of a run that is over the server is ready")
        print(docker("logs", "--tail", "1", server.name).stdout.strip())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
