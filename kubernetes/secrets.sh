#!/bin/sh
# Prints the Secrets that the overlays take, made of a folder of `dsl certs` with clients probe, client-0, client-1 ...:
#   kubernetes/secrets.sh certs | kubectl apply --filename -
set -eu
certs=$1
secret() {
    echo ---
    kubectl create secret generic "$@" --dry-run=client --output yaml
}
secret dsl-server-certs \
    --from-file="$certs/authority.pem" --from-file="$certs/server.pem" --from-file="$certs/server.key" \
    --from-file="$certs/revoked.txt" \
    --from-file="$certs/clients/probe/client.pem" --from-file="$certs/clients/probe/client.key"
set -- --from-file="$certs/authority.pem"
for folder in "$certs"/clients/client-*; do
    [ -d "$folder" ] || continue  # all clients are elsewhere
    name=${folder##*/}
    set -- "$@" --from-file="$name.pem=$folder/client.pem" --from-file="$name.key=$folder/client.key"
done
secret dsl-client-certs "$@"
