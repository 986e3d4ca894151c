#!/usr/bin/env bash
# What tests/slurm needs of the system, on Debian and Ubuntu; nothing is started.
set -euo pipefail
if command -v sbatch munged > /dev/null && [ -x /usr/sbin/slurmctld ] && [ -x /usr/sbin/slurmd ]; then
    exit 0
fi
export DEBIAN_FRONTEND=noninteractive
apt-get install --yes --quiet slurm-wlm munge || { apt-get update --quiet && apt-get install --yes --quiet slurm-wlm munge; }
