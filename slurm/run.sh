# A run as a job, from its start to the decision what comes after it: what train.sbatch and sweep.sbatch share.

# The warning comes before the time limit (USR1, see --signal) or a preemption (TERM).
warned=
trap 'warned=yes' USR1 TERM

source "$lockstep/slurm/site.sh"

# train RUN_DIRECTORY RECIPE [section.key=value ...]: ends this job as the run ends.
train() {
    local run=$1 recipe=$2
    shift 2
    mkdir -p "$run/slurm" || exit 1
    take "$run"
    # A chained job is on the list since it was submitted.
    if [ -z "$LOCKSTEP_CHAINED" ] || [ "$(tail -n 1 "$run/slurm/jobs.txt")" != "$job" ]; then
        echo "$job" >> "$run/slurm/jobs.txt"
    fi
    refuse_to_fail_for_ever "$run"
    # What an earlier start said must not be taken for this one's word.
    rm -f "$run/outcome.json"
    say "start ${SLURM_RESTART_COUNT:-0}: $run on $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), $launcher"

    start_workers "$recipe" "run.directory=$run" "$@" --resume auto &
    local step=$! told= status
    # Looked at every second: a signal that comes a moment before `wait` would not end it.
    while kill -0 "$step" 2> /dev/null; do
        if [ -n "$warned" ]; then
            # By a file: torchrun would die of the signal. Again and again: a run that is only starting removes the request of
            # an earlier one.
            touch "$run/stop"
            [ -n "$told" ] || say "warned: the run is asked to save and stop"
            told=yes
        fi
        sleep 1
    done
    wait "$step"
    status=$?
    decide "$run" "$status"
}

# take RUN_DIRECTORY: makes the run this job's own until it ends, and ends the job where another one has it, with nothing changed.
take() {
    local file=$1/slurm/lock holder waited=0 status
    exec 9>> "$file" || exit 1
    while flock --nonblock --conflict-exit-code 75 9; status=$?; [ "$status" != 0 ]; do
        if [ "$status" != 75 ]; then
            say "$file cannot be locked, so that two jobs might train in one run; use a file system with locks"
            exit 1
        fi
        holder=$(< "$file")
        # An earlier start of this job, or one on a node that is lost, may take a while to be gone for the file system.
        if [ "$waited" -ge 120 ] || { [ "$holder" != "$job" ] && running "$holder"; }; then
            say "job $holder is training in $1: nothing is changed; wait for it, or scancel it"
            exit 2
        fi
        sleep 1
        waited=$((waited + 1))
    done
    echo "$job" > "$file"
}

# running JOB: whether Slurm says so.
running() {
    [ -n "$(squeue --noheader --jobs="$1" --states=RUNNING,SUSPENDED --format=%i 2> /dev/null)" ]
}

# Becomes the srun that starts the workers on every node of the job.
start_workers() {
    # The job is asked for by its nodes: of a range like 1-4, and a number of tasks, Slurm would give one.
    local nodes=$SLURM_JOB_NUM_NODES cores=${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}
    local each=$((cores / workers))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$each} TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    local options=(--nodes="$nodes" --kill-on-bad-exit=1 --wait=60 --export=ALL "${srun_options[@]}")
    if [ "$launcher" = torchrun ]; then
        local host
        host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
        # Two jobs that share a node have different numbers, and so hardly ever one port.
        local port=$((20000 + (SLURM_JOB_ID + 2063 * ${SLURM_RESTART_COUNT:-0}) % 10000))
        exec srun "${options[@]}" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$cores" \
            "${container[@]}" python3 -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$workers" \
            --rdzv-backend=c10d --rdzv-endpoint="$host:$port" \
            --rdzv-id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" -m launch.train "$@"
    else
        # The workers meet on the first node, at a port that they derive from the job's number, unless MASTER_ADDR and
        # MASTER_PORT say otherwise.
        exec srun "${options[@]}" --ntasks=$((nodes * workers)) --ntasks-per-node="$workers" --cpus-per-task="$each" \
            "${container[@]}" python3 -u -m launch.train "$@"
    fi
}

# decide RUN_DIRECTORY STATUS: what comes after a run that ended. The truth is in outcome.json: torchrun and srun have codes
# of their own.
decide() {
    local run=$1 status=$2
    local code reason
    code=$(outcome exit_code "$run")
    reason=$(outcome reason "$run")
    code=${code:-$status}
    case $code in
        0)
            say "done: $reason"
            exit 0
            ;;
        75)
            rm -f "$run/slurm/failures.txt"
            say "$reason"
            start_again
            ;;
        2 | 78)
            say "giving up ($code): ${reason:-wrong usage or recipe, see above}"
            exit "$code"
            ;;
        *)
            say "failed ($code): ${reason:-no worker could say why, see above}"
            refuse_to_fail_for_ever "$run" ended
            start_again
            ;;
    esac
}

# outcome KEY RUN_DIRECTORY: what the run's outcome.json has there; nothing where there is none.
outcome() {
    sed -n 's/^ *"'"$1"'": *"\{0,1\}\(.*[^",]\)"\{0,1\},*$/\1/p' "$2/outcome.json" 2> /dev/null
}

# Counts the starts in a row since the newest checkpoint is what it is, and ends the job at one more than `failures`. A start
# is counted when it begins: on a lost node there is nobody left to count its end. With a second argument: nothing is counted.
refuse_to_fail_for_ever() {
    local file=$1/slurm/failures.txt newest count=0 before=
    newest=$(cd "$1/checkpoints" 2> /dev/null && ls | grep -E '^step-[0-9]+$' | tail -n 1)
    # A job that somebody submits begins anew.
    if [ "${SLURM_RESTART_COUNT:-0}" != 0 ] || [ -n "$LOCKSTEP_CHAINED" ] || [ -n "$2" ]; then
        read -r count before 2> /dev/null < "$file"
    fi
    if [ "$before" != "$newest" ]; then
        count=0
    fi
    if [ "${count:-0}" -gt "$failures" ]; then
        say "giving up (1): $count starts in a row have ended without a new checkpoint after ${newest:-the beginning}"
        exit 1
    fi
    if [ -z "$2" ]; then
        echo "$((count + 1)) $newest" > "$file"
    fi
}

# hand_over NEXT: jobs that wait for the end of this one now wait for that of NEXT, which goes on in its place: this one ends
# with 0 though the run is not done. For a task of an array those that wait for the whole array wait for NEXT as well.
hand_over() {
    local next=$1 waiting dependency changed
    squeue --noheader --states=PENDING --format='%F|%E' | sort -u | while IFS='|' read -r waiting dependency; do
        dependency=$(sed -E 's/\([a-z]+\)//g' <<< "$dependency")
        changed=$(sed -E "s/\b(after(ok|notok|any)):$job\b/\1:$next/g" <<< "$dependency")
        if [ -n "$SLURM_ARRAY_JOB_ID" ]; then
            changed=$(sed -E "s/\bafter(ok|any|corr):${SLURM_ARRAY_JOB_ID}_\*/&,afterok:$next/" <<< "$changed")
        fi
        if [ "$waiting" != "${next%%_*}" ] && [ "$changed" != "$dependency" ]; then
            if scontrol update "job=$waiting" "dependency=$changed"; then
                say "job $waiting waits for job $next now"
            else
                say "job $waiting cannot be told to wait for job $next, and starts too early: scontrol update job=$waiting dependency=$changed"
            fi
        fi
    done
}

# Sees to it that the run goes on, unless Slurm itself has ended this job: somebody has cancelled it, or Slurm requeues it.
start_again() {
    if [ "$(squeue --noheader --jobs="$job" --format=%T)" = COMPLETING ]; then
        say "Slurm has ended this job; where it does not bring it back itself, sbatch the same script to go on"
        exit 1
    fi
    if [ "$again" = chain ]; then
        local next
        # $0 is the copy of the batch script that Slurm made when it was submitted.
        next=$(LOCKSTEP_CHAINED=yes sbatch --parsable --dependency="afterany:$SLURM_JOB_ID" \
            ${SLURM_ARRAY_TASK_ID:+--array="$SLURM_ARRAY_TASK_ID"} "$0") || { say "no job can be submitted from here"; exit 1; }
        next=${next%%;*}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
        # From now on this is the run's job, even while it waits.
        echo "$next" >> "$run/slurm/jobs.txt"
        hand_over "$next"
        say "job $next goes on"
        exit 0
    fi
    say "back into the queue"
    scontrol requeue "$job" || { say "this job cannot be requeued; sbatch the same script again, or use again=chain"; exit 1; }
    # Slurm ends this script.
    exit 0
}
