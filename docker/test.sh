#!/usr/bin/env bash
# Builds the images and runs the compose files to the end; the containers' own counts of bytes beside the programs'.
#   docker/test.sh              as root; needs docker.io, docker-compose, debootstrap and kubectl, no registry of images
#   docker/test.sh plain tls    of its runs (plain, tls, crash, monitoring, pods, ranks) these alone
#   BASE=IMAGE docker/test.sh   on another base image than one that debootstrap makes here
# PYTHON (python3) needs PyYAML. What is made is removed, but for the image of the base, test-base, and the builder's
# cache: docker image prune.
set -euo pipefail
cd "$(dirname "$0")"

export TAG=test NAME=run CLIENTS=3 BASE="${BASE:-test-base}"
small="--model resnet8 --split 1 --epochs 1"
patience=900  # seconds, for any one run to end
work=$(mktemp -d)
projects=(dsl-test dsl-test-crash dsl-test-watched dsl-test-tls dsl-test-ward-1 dsl-test-ward-2 dsl-test-ward-3)
daemon=""

say() { echo "== $*"; }

compose() {
    if docker compose version > /dev/null 2>&1; then docker compose "$@"; else docker-compose "$@"; fi
}

of_project() { docker ps --all --quiet --filter "label=com.docker.compose.project=$1" "${@:2}"; }

tidy() {
    code=$?
    set +e
    for project in "${projects[@]}"; do
        [ "$code" = 0 ] || of_project "$project" | xargs --no-run-if-empty --max-args 1 docker logs --tail 20
        CERTS=$work CLIENT_CERTS=$work COUNTED=$work compose --project-name "$project" --profile monitoring \
            down --volumes --timeout 1 > /dev/null 2>&1
    done
    docker rm --force dsl-test-pods-{dsl-server,dsl-server-0,dsl-server-1,client-0,client-1,client-2} > /dev/null 2>&1
    docker image rm --no-prune dsl-server:test dsl-client:test test-prometheus > /dev/null 2>&1
    rm -rf "$work"
    [ -z "$daemon" ] || kill "$daemon"
    exit "$code"
}
trap tidy EXIT

start_docker() {
    docker info > /dev/null 2>&1 && return
    say "starting Docker's daemon"
    dockerd > "$work/dockerd.log" 2>&1 &
    daemon=$!
    for _ in $(seq 30); do docker info > /dev/null 2>&1 && return; sleep 1; done
    cat "$work/dockerd.log"
    return 1
}

# A Debian like that of the registries' slim images, with this machine's certificates and its index of packages.
make_base() {
    docker image inspect test-base > /dev/null 2>&1 && return
    say "making a base image by debootstrap"
    debootstrap --variant=minbase --include=ca-certificates trixie "$work/base" > "$work/debootstrap.log"
    rm -rf "$work"/base/usr/share/{doc,info,locale,man}/* "$work"/base/var/cache/apt/archives/*.deb
    printf 'path-exclude=/usr/share/%s/*\n' doc info locale man > "$work/base/etc/dpkg/dpkg.cfg.d/slim"
    cp /etc/ssl/certs/ca-certificates.crt "$work/base/etc/ssl/certs/"
    {
        printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\ntimeout = 180\n'
        index=$(python3 -m pip config get global.index-url 2> /dev/null) && echo "index-url = $index"
    } > "$work/base/etc/pip.conf" || true
    tar --directory "$work/base" --create . | docker import - test-base > /dev/null
    rm -rf "$work/base"
}

# Waits until every container of these projects has ended; fails where one ended with another code than 0.
all_end() {
    local end=$((SECONDS + patience)) codes
    for project in "$@"; do
        until [ -z "$(of_project "$project" --filter status=running --filter status=restarting)" ]; do
            [ "$SECONDS" -lt "$end" ] || { echo "$project has not ended in $patience s"; return 1; }
            sleep 2
        done
        # shellcheck disable=SC2046  # identifiers are words
        codes=$(docker inspect --format '{{.Name}} ended with {{.State.ExitCode}}' $(of_project "$project"))
        echo "$codes"
        ! grep --quiet --invert-match 'with 0$' <<< "$codes" || return 1
    done
}

counted() {
    export COUNTED=$work/$1
    install --directory --owner 10001 "$COUNTED"
}

plain_run() {
    say "DSL, a server and three clients on a network of their own"
    counted plain
    RUN=$small compose --project-name dsl-test --file compose.yaml --file compose.test.yaml \
        up --detach --scale client=3
    all_end dsl-test
    python3 compare.py "$COUNTED"
}

# Every client is a project, and so a network, of its own, as on another machine.
tls_run() {
    say "CSL with certificates, over the server's published port"
    counted tls
    install --directory --owner 10001 "$work/keys"
    certs() {
        docker run --rm --network none --volume "$work/keys:/keys" --entrypoint dsl dsl-server:test certs "$@"
    }
    certs init /keys/certs --host gpu-host localhost
    for name in probe ward-1 ward-2 ward-3; do certs client /keys/certs "$name"; done
    certs revoke /keys/certs probe
    local gateway  # this machine, as containers see it
    gateway=$(docker run --rm --add-host this:host-gateway --entrypoint getent dsl-server:test hosts this)
    gateway=${gateway%% *}
    export CERTS=$work/keys/certs CLIENT_CERTS=$work/keys/certs/clients/ward-1
    export SERVER=gpu-host:50051 PORT=$gateway:50051 GPU_HOST=gpu-host:$gateway
    local files=(--file compose.yaml --file compose.tls.yaml --file compose.test.yaml)
    RUN="$small --method csl" compose --project-name dsl-test-tls "${files[@]}" up --detach server
    for name in ward-1 ward-2 ward-3; do
        CLIENT_CERTS=$work/keys/certs/clients/$name \
            compose --project-name "dsl-test-$name" "${files[@]}" up --detach --no-deps client
    done
    server_is_well "$(of_project dsl-test-tls)"
    all_end dsl-test-tls dsl-test-ward-1 dsl-test-ward-2 dsl-test-ward-3
    python3 compare.py "$COUNTED"
    unset SERVER PORT
}

server_is_well() {
    for _ in $(seq 60); do
        [ "$(docker inspect --format '{{.State.Health.Status}}' "$1")" != healthy ] || return 0
        sleep 1
    done
    docker inspect --format '{{json .State.Health}}' "$1"
    return 1
}

crash_run() {
    say "DSL with data of the host, the server and a client killed on the way"
    local run="$small --epochs 3 --checkpoint-every 2"
    install --directory "$work/data"
    xz --decompress --stdout ../dsl_client/sample/fashion-mnist.npz.xz > "$work/data/sample.npz"
    export DATA=$work/data CLIENT_FLAGS="--data npz:/data/sample.npz"
    RUN=$run compose --project-name dsl-test-crash --file compose.yaml up --detach --scale client=3
    local server client
    server=$(of_project dsl-test-crash --filter label=com.docker.compose.service=server)
    client=$(of_project dsl-test-crash --filter label=com.docker.compose.service=client | head -1)
    for container in "$server" "$client"; do
        until docker exec "$server" sh -c 'ls /runs/run/checkpoints/*' > /dev/null 2>&1; do sleep 1; done
        sleep 5
        kill -KILL "$(docker inspect --format '{{.State.Pid}}' "$container")"
    done
    all_end dsl-test-crash
    docker inspect --format '{{.Name}} was started again {{.RestartCount}} times' "$server" "$client"
    docker cp "$server:/runs/run/summary.json" "$work/summary.json"
    python3 -c "
import json, sys
samples = json.load(open(sys.argv[1]))['samples_trained']
print(f'{samples:,} samples learned from')
sys.exit(samples != 3 * 10_000)
" "$work/summary.json"
    unset DATA CLIENT_FLAGS
}

# Prometheus is Debian's, with the arguments of the usual image. Grafana is in no distribution: it is not run.
monitoring_run() {
    say "Prometheus reads a server and three clients"
    docker build --quiet --tag test-prometheus - > /dev/null <<< "
FROM $BASE
RUN apt-get update && apt-get install --yes --no-install-recommends prometheus && rm -rf /var/lib/apt/lists/*
ENTRYPOINT [\"prometheus\", \"--config.file=/etc/prometheus/prometheus.yml\", \"--storage.tsdb.path=/prometheus\"]"
    export PROMETHEUS_IMAGE=test-prometheus
    compose --project-name dsl-test-watched --file compose.yaml --profile monitoring \
        up --detach --scale client=3 server client prometheus
    local prometheus
    prometheus=$(of_project dsl-test-watched --filter label=com.docker.compose.service=prometheus)
    for _ in $(seq 60); do
        up=$(docker exec "$prometheus" promtool query instant http://localhost:9090 'up == 1' || true)
        [ "$(grep --count '^up{' <<< "$up")" -lt 4 ] || break
        sleep 2
    done
    echo "$up"
    [ "$(grep --count '^up{' <<< "$up")" = 4 ]
    compose --project-name dsl-test-watched --file compose.yaml --profile monitoring down --volumes --timeout 1
}

# The manifests' pods; of a run that is shorter, for the machine is smaller than a cluster.
pods_run() {
    say "the pods of kubernetes/overlays/tls"
    install --directory --owner 10001 "$work/pods"
    certs() {
        docker run --rm --network none --volume "$work/pods:/pods" --entrypoint dsl dsl-server:test certs "$@"
    }
    certs init /pods/certs --host dsl-server localhost
    for name in probe client-0 client-1 client-2; do certs client /pods/certs "$name"; done
    { kubectl kustomize ../kubernetes/overlays/tls; ../kubernetes/secrets.sh "$work/pods/certs"; } \
        | sed 's/epochs = 4/epochs = 1/' > "$work/manifests.yaml"
    "${PYTHON:-python3}" pods.py "$work/manifests.yaml"
}

# Likewise, and saved more often: one of the two ranks is killed on the way.
ranks_run() {
    say "the pods of kubernetes/overlays/ranks"
    kubectl kustomize ../kubernetes/overlays/ranks \
        | sed 's/epochs = 4/epochs = 2/; s/checkpoint_every = 30.0/checkpoint_every = 2.0/' > "$work/ranks.yaml"
    "${PYTHON:-python3}" pods.py "$work/ranks.yaml"
}

start_docker
[ "$BASE" != test-base ] || make_base
say "building"
COUNTED=$work compose --file compose.yaml build > "$work/build.log" || { tail -30 "$work/build.log"; exit 1; }
docker image ls --filter reference='dsl-*:test'
for run in ${*:-plain tls crash monitoring pods ranks}; do "${run}_run"; done
say "passed"
