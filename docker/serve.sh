#!/bin/sh
# dsl-server for a container that may be started again: begins the run in the folder $RUN_FOLDER, or goes on with it.
# Of a run that is over it says so and ends; with AFTERWARDS=stay it stays, so that the folder can be fetched.
set -eu
folder=${RUN_FOLDER:-/runs/run}
if [ -e "$folder/summary.json" ]; then
    echo "the run in $folder is over"
    [ "${AFTERWARDS:-leave}" != stay ] || exec sleep infinity
elif [ -e "$folder/run.json" ]; then
    exec dsl-server "$@" --resume "$folder"
else
    exec dsl-server "$@" --out "$folder"
fi
