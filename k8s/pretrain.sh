#!/bin/sh
# What a pod of a pretraining runs: torchrun of one node's ranks. It ends not with torchrun's exit code, 1 whatever happened,
# but with theirs, by which the failure policy goes: 2 and 4 (bad input, a full disk, a loss that is not a number) would come
# again, 75 was saved by all.
MEGASCALE_EXIT_CODES=$(mktemp -d) || exit 1
export MEGASCALE_EXIT_CODES
torchrun --shutdown-timeout=300 launch/pretrain.py "$@" &
torchrun=$!
trap 'kill -s TERM $torchrun' TERM
while :; do
    wait $torchrun
    status=$?
    kill -0 $torchrun 2>/dev/null || break # else it was the signal that ended `wait`
done
codes=$(cat "$MEGASCALE_EXIT_CODES"/rank-* 2>/dev/null)
# a store that did not answer may, next time, and the process that holds a run's folder may have ended
mistake=$(echo "$codes" | grep -v -e StoreUnavailable -e FolderInUse | grep -o -e '^2' -e '^4' | head -n 1)
ended=$(echo "$codes" | grep -c -e '^0' -e '^75')
if [ "$ended" = "$PET_NPROC_PER_NODE" ] && echo "$codes" | grep -q '^75'; then status=75; fi
exit "${mistake:-$status}"
