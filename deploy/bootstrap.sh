#!/usr/bin/env bash
# What vast.ai calls at every start of a box: vastai create instance ... --onstart deploy/bootstrap.sh. It takes 4,048
# characters at most, so this only fetches the project and hands over to deploy/onstart.sh, which it leaves running.
# Called again, it fetches nothing that is there. Set with --env '-e NAME=value':
#     SLMS_REPOSITORY   what git is to clone
#     SLMS_REVISION     a branch, tag or commit of it (default: its default branch)
#     SLMS_HOME         the project's folder on the box (default: ~/slms)
set -u
home=${SLMS_HOME:-$HOME/slms}

say() { echo "bootstrap: $*" >&2; }

retry() {  # a box may be there before its network
    for pause in 5 10 30 60 0; do
        "$@" && return
        say "failed: $*"
        sleep "${SLMS_WAIT:-$pause}"
    done
    return 1
}

has_tools() { command -v git make gcc python3 >/dev/null && python3 -c 'import ensurepip, venv' 2>/dev/null; }

if ! has_tools; then
    export DEBIAN_FRONTEND=noninteractive
    retry apt-get update -qq
    retry apt-get install -y -qq git build-essential python3-dev python3-venv || { say "needs git, make, gcc, python3"; exit 1; }
fi

if [ ! -e "$home/deploy/onstart.sh" ]; then
    if [ -z "${SLMS_REPOSITORY:-}" ]; then
        say "nothing at $home: copy the project there and type \`bash deploy/onstart.sh\` in it, or set SLMS_REPOSITORY"
        exit 2
    fi
    rm -rf "$home.new"  # of a start that was cut short
    retry git clone --quiet "$SLMS_REPOSITORY" "$home.new" || exit 1
    git -C "$home.new" checkout --quiet "${SLMS_REVISION:-HEAD}" || { say "no revision $SLMS_REVISION"; exit 2; }
    mv "$home.new" "$home" || exit 1
fi

cd "$home" && mkdir -p runs || exit 1
nohup bash deploy/onstart.sh >>runs/onstart.log 2>&1 </dev/null &
say "started: see $home/runs/onstart.log"
