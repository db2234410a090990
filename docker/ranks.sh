#!/bin/sh
# One rank of a server of $RANKS, where each is a container of its own, such as a pod of an Indexed Job. Calls
# dsl-server by torchrun, which meets the others at $MEETING, host:port of the first. This one's number is
# $JOB_COMPLETION_INDEX; $RANK_NAME is its host's name, of those of all the first in the alphabet at the first rank.
# Of a run that is over, which $FIRST_FOLDER tells, it says so and ends.
set -eu
folder=${RUN_FOLDER:-/runs/run}
if [ -e "${FIRST_FOLDER:-$folder}/summary.json" ]; then
    echo "the run in $folder is over"
    exit
fi
# Wrong settings end with 2, which torchrun would not tell: whoever starts containers again need not.
dsl-server "$@" --print-config > /dev/null
case $JOB_COMPLETION_INDEX in 0) first=true ;; *) first=false ;; esac
# No restarts within: the others' counts of them would differ. All end, and all are started again. Until the first one
# is there, which may need its image, the others wait for 10 minutes.
exec python -m torch.distributed.run --nnodes "$RANKS" --nproc-per-node 1 --max-restarts 0 \
    --rdzv-backend c10d --rdzv-id dsl --rdzv-endpoint "$MEETING" --rdzv-conf "is_host=$first,read_timeout=600" \
    --local-addr "$RANK_NAME" -m dsl_server "$@" --resume "$folder"
