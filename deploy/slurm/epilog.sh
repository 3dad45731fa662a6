#!/bin/sh
# Epilog= of slurm.conf, as root on each node after the job's last process there: what the job has left there is freed.
#
# Regions of a session have ended with their process already. This ends those that were to outlive it: leases of kind
# none, and those with a time to live. Transfers that still use them fail.
set -eu

peermemctl=${PEERMEMCTL:-/opt/peermem/bin/peermemctl}

status=0
"$peermemctl" --timeout 30s regions delete --force --slurm-job "$SLURM_JOB_ID" || status=$?
# 3: the daemon is not there, and no region outlives its daemon. Anything else would drain the node, for a look at it.
[ "$status" -eq 3 ] || exit "$status"
