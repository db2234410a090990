#!/bin/sh
# One rank of a server of $RANKS, where each is a container of its own, such as a pod of an Indexed Job. This one's
# number is $JOB_COMPLETION_INDEX; they meet at $MEETING, host:port of the first. Of a run that is over, which
# $FIRST_FOLDER tells, it says so and ends.
set -eu
folder=${RUN_FOLDER:-/runs/run}
if [ -e "${FIRST_FOLDER:-$folder}/summary.json" ]; then
    echo "the run in $folder is over"
    exit
fi
# What torchrun would set for each process. Of one in a container it has nothing else to do: when a rank is lost all
# end, and whoever starts containers starts them again.
export RANK="$JOB_COMPLETION_INDEX" LOCAL_RANK=0 WORLD_SIZE="$RANKS"
export MASTER_ADDR="${MEETING%:*}" MASTER_PORT="${MEETING##*:}"
export USE_LIBUV=0  # to listen with, which the distribution's torch is built without
exec dsl-server "$@" --resume "$folder"
