# Shared by the lab's bash scripts: where things are, and how they speak. Source it; it defines, it does nothing.
# shellcheck shell=bash

set -euo pipefail

LAB_DIR=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
REPO=$(readlink -f -- "$LAB_DIR/../..")
CACHE=${KUASAR_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/kuasar-nix}
export REPO CACHE

say() { printf '%s\n' "$*" >&2; }
step() { printf '==> %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }

# Runs a command whose output only matters when it fails; shows a line with the time that has passed while it runs.
# usage: quietly LOGFILE TITLE COMMAND...
quietly() {
    local log=$1 title=$2 start=$SECONDS pid status=0 next=20
    shift 2
    mkdir -p "$(dirname -- "$log")"
    "$@" >"$log" 2>&1 &
    pid=$!
    # The command is ours to end when the user ends us.
    # shellcheck disable=SC2064
    trap "kill $pid 2>/dev/null || true; exit 130" INT TERM
    while kill -0 "$pid" 2>/dev/null; do
        if [ -t 2 ]; then
            printf '\r    %s: %ds  %.60s\033[K' "$title" $((SECONDS - start)) "$(tail -n1 "$log" | tr -d '\r')" >&2
        elif [ $((SECONDS - start)) -ge "$next" ]; then
            say "    $title: $((SECONDS - start)) s, $(tail -n1 "$log" | tr -d '\r' | cut -c1-100)"
            next=$((next + 20))
        fi
        sleep 0.2
    done
    trap - INT TERM
    wait "$pid" || status=$?
    if [ -t 2 ]; then printf '\r\033[K' >&2; fi
    if [ "$status" -ne 0 ]; then
        say "    $title failed after $((SECONDS - start)) s; the end of $log:"
        tail -n 25 "$log" | sed 's/^/    | /' >&2
        return "$status"
    fi
    say "    $title: $((SECONDS - start)) s"
}
