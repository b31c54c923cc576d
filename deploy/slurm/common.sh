# What the scripts beside this share: a stage over all nodes of a Slurm allocation, stopped in time and queued again.
#
# Slurm runs the script on the allocation's first node, and so do the command on Ray's head and rank 0 of a training:
# this script tells them to stop. Sent by Slurm before the time is up or the job is preempted (--signal=B:USR1@300),
# SIGUSR1 has the command finish what is in hand, or save, and end with exit code 75; then the job is queued again and
# goes on from there. Other ends stay as they are: 0 done, 1 failed, 2 the configuration cannot be used. A job that was
# cancelled is not queued again.
set -uo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_ip=${CARRARA_HEAD_IP:-$(hostname -I | awk '{print $1}')} # on the network that the nodes share
port=$((20000 + SLURM_JOB_ID % 10000)) # between those of Ray's workers and those that Linux gives away
state=$(mktemp --directory "${TMPDIR:-/tmp}/carrara-$SLURM_JOB_ID-XXXXXX") || exit 1 # for the command's pid and exit code
trap 'rm -rf "$state"' EXIT
asked=""
# Ray's sockets lie up to 68 letters below the folder for temporary files; their paths have room for 107.
temporary=${RAY_TMPDIR:-${TMPDIR:-/tmp}}
[ "${#temporary}" -le 39 ] || export RAY_TMPDIR=/tmp

# stage COMMAND...: `carrara COMMAND...` on a Ray that spans the nodes, closed to strangers by a token of its own.
stage() {
    RAY_AUTH_TOKEN=$(od --address-radix=n --read-bytes=32 --format=x1 /dev/urandom | tr --delete ' \n')
    export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=900
    export state head_ip port patience=${CARRARA_HEAD_WAIT_S:-900}
    # shellcheck disable=SC2016  # expanded on the nodes
    local each_node='
        if [ "$SLURM_PROCID" != 0 ]; then # where nothing listens yet, Ray gives up within seconds
            until (: < "/dev/tcp/$head_ip/$port") 2> /dev/null; do
                # The head may have failed: the nodes are not held for that until the time is up.
                ((SECONDS < patience)) || { echo "carrara: no Ray at $head_ip:$port in $patience s" >&2; exit 1; }
                sleep 1
            done
        fi
        exec ray symmetric-run --address "$head_ip:$port" --min-nodes "$SLURM_NNODES" \
            --num-cpus "${SLURM_CPUS_ON_NODE:-1}" --object-store-memory 1000000000 -- bash -c "$on_head" "$@"'
    # shellcheck disable=SC2016
    export on_head='
        RAY_ADDRESS="$head_ip:$port" carrara "$@" &
        echo $! > "$state/pid"
        wait $!
        echo $? > "$state/code"
        exit "$(cat "$state/code")"'
    follow srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 bash -c "$each_node" carrara carrara "$@"
}

# fit ARGUMENTS...: train/main.py with these arguments by DeepSpeed's launcher, a node at a time and without ssh.
fit() {
    # -P: a train.py of one's own where the job was submitted is not taken for this one.
    main=$(python -P -c 'import importlib.util; print(importlib.util.find_spec("train.main").origin)') || exit 1
    slots=${CARRARA_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
    hosts=$(printf "%s slots=$slots\n" "${nodes[@]}")
    export state head_ip port main hosts
    # shellcheck disable=SC2016
    local each_node='
        hostfile=$(mktemp) && echo "$hosts" > "$hostfile"
        deepspeed --hostfile "$hostfile" --no_ssh --node_rank "$SLURM_NODEID" --master_addr "$head_ip" \
            --master_port "$port" "$main" "$@" &
        launcher=$!
        [ "$SLURM_NODEID" != 0 ] || echo "$launcher" > "$state/pid"
        trap : TERM # which srun sends once another node has ended; what this one ended with is still told
        wait "$launcher"; code=$? # before it is asked whether it lives: it may have failed at once
        while kill -0 "$launcher" 2> /dev/null; do wait "$launcher"; code=$?; done
        rm -f "$hostfile"
        [ "$SLURM_NODEID" != 0 ] || echo "$code" > "$state/code"
        exit "$code"'
    ranks=1 follow srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 bash -c "$each_node" fit "$@"
}

# Who is told to stop: the command itself, or the ranks. DeepSpeed's launcher would end with 1 for it, so it is passed by.
told() {
    local pid
    [ ! -e "$state/code" ] || return # it has ended, and its number may be another's
    pid=$(cat "$state/pid" 2> /dev/null) || return
    if [ -n "${ranks:-}" ]; then
        pgrep --parent "$(pgrep --parent "$pid" | paste --serial --delimiters=,)" 2> /dev/null
    else
        echo "$pid"
    fi
}

ask() {
    asked=$1
    local pids=""
    until pids=$(told) && [ -n "$pids" ]; do # it has not come so far yet
        kill -0 "$step" 2> /dev/null || return
        sleep 1
    done
    # shellcheck disable=SC2086
    kill -TERM $pids 2> /dev/null
}

# follow COMMAND...: run it to its end, and this script with it.
follow() {
    "$@" &
    step=$!
    trap 'ask USR1' USR1
    trap 'ask TERM' TERM
    while kill -0 "$step" 2> /dev/null; do wait "$step"; done # a signal ends a wait
    local code
    code=$(cat "$state/code" 2> /dev/null) || { # whatever srun says: Ray that does not start ends with 0
        echo "carrara: the command was not run to its end; the output of the nodes is above" >&2
        code=1
    }
    # 75: it stopped, and goes on from there. Above 128: it was told so early that the signal ended it.
    if { [ "$code" = 75 ] || { [ "$asked" = USR1 ] && [ "$code" -gt 128 ]; }; } &&
        [[ $(scontrol show job "$SLURM_JOB_ID") != *JobState=CANCELLED* ]]; then
        echo "carrara: queued again, to go on from here" >&2
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
