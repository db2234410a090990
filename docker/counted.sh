#!/bin/sh
# Runs a program and ends as it ends; before, writes what the container's network interface has counted, and the
# program's summary, into /counted/<program>-<hostname>/.
"$@"
code=$?
folder=/counted/$1-$(hostname)
mkdir -p "$folder"
for counter in rx_bytes tx_bytes rx_packets tx_packets; do
    cp "/sys/class/net/eth0/statistics/$counter" "$folder/$counter"
done
for summary in "${RUN_FOLDER:-/state/out}"/summary.json; do
    [ ! -e "$summary" ] || cp "$summary" "$folder/"
done
exit $code
