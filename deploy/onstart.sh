#!/usr/bin/env bash
# Trains on a rented box until the run is over, however often the box is paused, loses a process or is called to it
# again: bash deploy/onstart.sh. vast.ai calls it at every start of the box, through deploy/bootstrap.sh.
#
# It sets up what is missing, asks the config what it means, trains, and reads how that ended in the run's outcome.json
# (training/outcome.py), since a launcher's exit code does not tell:
#     finished; refused; stopped because run.deadline, run.max_minutes or run.stop_after_steps says so    the end
#     anything else: crashed, killed without a word, stopped by a signal that was not meant for this     the same again
# after a pause that doubles as long as no new checkpoint comes of it. SIGTERM or Ctrl-C to this script stops training,
# which saves, and then ends it: kill $(cat runs/.onstart).
#
# In the environment:
#     SLMS_ARGS     what follows `multigpu_train.py` on a command line, quoted as there
#     SLMS_AT_END   a command for when nothing is left to do, such as one that stops the box; it finds the exit code in
#                   SLMS_CODE. Not called after a signal to this script
#     SLMS_WAIT     seconds before it tries again, at first (30); 16 times as long at most
#     SLMS_TRIES    endings in a row without a new checkpoint after which it gives up (10)
# Exit codes: 0 finished, or running already; 1 given up; 2 refused; 75 stopped.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

say() { echo "onstart: $(date -u +%FT%TZ) $*" >&2; }

# vast.ai gives what it was told with --env, and the box's own names, to the first process; an ssh session lacks them.
# They are read from there each time and never written anywhere, for keys are among them.
while IFS= read -r -d '' pair; do
    name=${pair%%=*}
    [[ $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ && -z ${!name+set} ]] && export "${pair?}"
done < <(cat "${SLMS_ENVIRON:-/proc/1/environ}" 2>/dev/null)

# A save may take longer than the 30 s after which a launcher kills whom it has told to stop.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}
arguments=${SLMS_ARGS:-}
first=${SLMS_WAIT:-30}
most=${SLMS_TRIES:-10}

mkdir -p runs
exec 9>>runs/.onstart
flock -n 9 || { say "it is running already"; exit 0; }
echo $$ >runs/.onstart

child=
stopping=
stop() {
    stopping=yes
    [ -n "$child" ] && kill -TERM "$child" 2>/dev/null
}
trap stop TERM INT HUP

# Runs a command beside this script, which so hears signals, and returns its exit status. It does not hold the lock: a
# box on which this script alone was killed may call it again.
attend() {
    local status
    [ -n "$stopping" ] && return 143
    "$@" 9>&- &
    child=$!
    wait "$child"
    status=$?
    while [ -n "$stopping" ] && kill -0 "$child" 2>/dev/null; do  # the signal ended the wait, not the child
        wait "$child"
        status=$?
    done
    child=
    return "$status"
}

end() {
    say "$2"
    if [ -n "${SLMS_AT_END:-}" ] && [ -z "$stopping" ]; then
        SLMS_CODE=$1 bash -c "$SLMS_AT_END" 9>&- || say "SLMS_AT_END has failed (exit $?)"
    fi
    exit "$1"
}

plan() { eval ".venv/bin/python multigpu_train.py --dry-run --json $arguments"; }

value_of() {  # value_of FILE KEY: of a JSON object, nothing where there is none
    .venv/bin/python -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$1" "$2" 2>/dev/null
}

newest() { ls "$run/checkpoints" 2>/dev/null | grep '^step-' | tail -n 1; }

# Sets up, asks and trains once; sets `told` to why that ended, for people, and `saved` where a checkpoint came of it.
try() {
    saved=
    attend make --no-print-directory install || { told="the installation failed (exit $?)"; return; }
    plan >runs/.plan
    case $? in
        0) ;;
        2) end 2 "the config is wrong: SLMS_ARGS=$arguments" ;;
        *) told="the config could not be looked at"; return ;;
    esac
    run=$(value_of runs/.plan run)
    # Of an earlier call of this script that was killed, training may be left.
    [ ! -e "$run/.lock" ] || attend flock "$run/.lock" true
    rm -f "$run/outcome.json"
    before=$(newest)
    say "training $run"
    attend make --no-print-directory train ARGS="$arguments"
    # A launcher may end before the process that it told to stop has saved.
    [ ! -e "$run/.lock" ] || flock --wait 600 "$run/.lock" true 9>&-
    code=$(value_of "$run/outcome.json" code)
    reason=$(value_of "$run/outcome.json" reason)
    case ${code:-none}/${reason:-} in
        0/*) end 0 "$run has finished" ;;
        2/*) end 2 "$run was refused: $(value_of "$run/outcome.json" message)" ;;
        75/run.*) end 75 "$run was stopped by $reason" ;;
        none/*) told="$run ended without a word: it was killed" ;;
        *) told="$run ended with code $code ($reason)" ;;
    esac
    [ "$(newest)" = "$before" ] || saved=yes
}

run=
failures=0
wait=$first
while :; do
    [ -z "$stopping" ] && try
    [ -n "$stopping" ] && end 75 "stopped by a signal"
    if [ -n "$saved" ]; then failures=0 wait=$first; else failures=$((failures + 1)); fi
    [ "$failures" -ge "$most" ] && end 1 "$told; given up after $failures endings without a new checkpoint"
    say "$told; again in $wait s"
    attend sleep "$wait"
    wait=$((wait * 2 > first * 16 ? first * 16 : wait * 2))
done
