#!/bin/sh
# Prolog= of slurm.conf, as root on each node before a job's first step there: a node whose daemon does not answer takes no
# job. Slurm drains the node when this fails, and queues the job again.
set -eu

peermemctl=${PEERMEMCTL:-/opt/peermem/bin/peermemctl}

if ! said=$("$peermemctl" --timeout 10s node 2>&1); then
    echo "peermem does not take work on this node: $said" >&2
    exit 1
fi
