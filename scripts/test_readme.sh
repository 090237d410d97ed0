#!/usr/bin/env bash
# The tests as the README says: runs its command, read from there. Makes .venv, or installs into it
# (an editable install there is replaced). `--print` prints the command only.
source "$(dirname "$0")/lib.sh"

mapfile -t commands < <(grep -x 'python3 -m venv .* \.venv/bin/pytest' README.md)
[ ${#commands[@]} = 1 ] || die "README.md has ${#commands[@]} commands that end in pytest, expected 1"
if [ "${1:-}" = --print ]; then echo "${commands[0]}"; exit; fi
say "${commands[0]}"
eval "${commands[0]}"
