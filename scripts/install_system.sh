#!/usr/bin/env bash
# What the C++ tests and the fuzz target need from the system: a C++20 compiler, doctest, and clang
# with libFuzzer; and ccache, which spares much of the building but is not needed. Installs what is
# missing where apt-get and the right to use it are at hand.
source "$(dirname "$0")/lib.sh"

missing=()
command -v c++ >/dev/null || missing+=(g++)
[ -e /usr/include/doctest/doctest.h ] || missing+=(doctest-dev)
has_fuzzer || missing+=(clang-19 libclang-rt-19-dev)
needed=${#missing[@]}
command -v ccache >/dev/null || missing+=(ccache)
[ ${#missing[@]} -gt 0 ] || exit 0

say "system packages: ${missing[*]}"
as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo -n)
if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
  [ "$needed" -gt 0 ] || exit 0
  cannot "for want of apt-get or of root, not installed: ${missing[*]} (Debian's names)"
fi
"${as_root[@]}" apt-get update -qq || [ "$needed" -gt 0 ] || exit 0
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
  [ "$needed" = 0 ] || cannot "apt-get could not install: ${missing[*]}"
