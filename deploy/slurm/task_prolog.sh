#!/bin/sh
# TaskProlog= of slurm.conf, as the job's user before each task: what it prints becomes the task's environment. Jobs reach
# the daemon of their node by it.
echo "export PEERMEM_TARGET=unix:///run/peermem/peermem.sock"
