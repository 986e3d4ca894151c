# The site's surroundings, as the lines at the top of a batch script describe them: modules, environment, code.

job=$SLURM_JOB_ID
if [ -n "$SLURM_ARRAY_JOB_ID" ]; then
    job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi

say() {
    printf '%s job %s: %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$job" "$*"
}

for module in "${modules[@]}"; do
    module load "$module" || { say "module $module cannot be loaded"; exit 1; }
done
# A job that goes on for another one has inherited the rest.
if [ -z "$LOCKSTEP_CHAINED" ]; then
    if [ -n "$venv" ]; then
        PATH=$venv/bin:$PATH
    fi
    # This copy of the code before any other, and a user's own modules after it. Without PYTHONSAFEPATH `python -m` would
    # look first where the job was submitted, whose files somebody may have edited since.
    export PYTHONPATH=$lockstep:${own_code:-$PWD}${PYTHONPATH:+:$PYTHONPATH}
    export PYTHONSAFEPATH=1
fi
