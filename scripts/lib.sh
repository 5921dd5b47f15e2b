# shellcheck shell=bash
# Shared by everything in scripts/: where things are, how to say things, and whether VMs run here directly or in the sandbox.
# Source it after `set -euo pipefail`.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Everything the scripts prepare; never under version control. Several checkouts may share one.
BUILD=${SPECTRUM_BUILD:-$ROOT/build}
# shellcheck disable=SC2034 # used by those who source this
KERNEL_DIR=$BUILD/kernel
# shellcheck disable=SC2034 # the same
ORDINARY_USER=61234

# say TEXT...: one line to the person who watches, kept out of the command's own output.
say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

# die TEXT...: the sentence that ends the script.
die() {
    say "$*"
    exit 1
}

# has PROGRAM: is it there?
has() { command -v "$1" >/dev/null 2>&1; }

# installed PACKAGE...: are all of these Debian packages installed?
installed() {
    local have
    have=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "$@" 2>/dev/null | grep -c '^installed ' || true)
    [ "$have" -ge $# ]
}

# has_hardware_kvm: does KVM use the CPU's own virtualisation here? /dev/kvm alone is no proof, software-only KVMs offer it too.
has_hardware_kvm() {
    grep -Eqw 'svm|vmx' /proc/cpuinfo && (exec 9<>/dev/kvm) 2>/dev/null
}

# run_vm [--memory SIZE] [--timeout SECONDS] [--share DIR] -- CMD...: runs a command that needs a true /dev/kvm, here if there is
# one, otherwise in the sandbox; either way it finds DIR as $SANDBOX_SHARE.
run_vm() {
    local limit=0 share=""
    if ! has_hardware_kvm; then
        "$ROOT/scripts/sandbox" "$@"
        return
    fi
    while [ "$1" != -- ]; do
        case $1 in --timeout) limit=$2 ;; --share) share=$2 ;; esac
        shift 2
    done
    shift
    SANDBOX_SHARE=${share:-$(mktemp -d)} timeout --foreground --kill-after=10 "$limit" "$@"
}

# locked NAME CMD...: one at a time, for what two scripts must not prepare at once. A no-op when this process holds the lock.
locked() {
    local name=$1 held="LOCKED_$1"
    shift
    if [ -n "${!held:-}" ]; then
        "$@"
        return
    fi
    mkdir -p "$BUILD"
    (
        flock 8
        export "$held=1"
        "$@" 8>&-
    ) 8>"$BUILD/.$name.lock"
}
