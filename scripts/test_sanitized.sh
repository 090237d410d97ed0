#!/usr/bin/env bash
# The bindings under AddressSanitizer and UndefinedBehaviorSanitizer: the tests that need no torch
# against a _core built for it, in an environment of its own. Arguments go to pytest.
source "$(dirname "$0")/lib.sh"

env=$WORK/sanitized
venv "$env" "$PYTHON"
say "_core with sanitizers"
"$env/bin/python" -m pip install -q -c constraints.txt '.[test]' -Cbuild-dir="$WORK/sanitized-build" \
  -Ccmake.define.KV_SANITIZE=address,undefined -Ccmake.define.KV_CUDA=OFF \
  -Ccmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=ON -Cinstall.strip=false

# Python itself is not built for them: their runtime has to be there before anything else, and
# Python's own allocator, which hides overruns from it, out of the way. Python leaks by design.
preload="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)"
if "$env/bin/python" -c 'import pagedkv' 2>/dev/null; then
  die "this _core is not sanitized: it imports without the sanitizer's runtime"
fi
say "pytest with sanitizers"
# -s: a report is written past Python, and would be lost with what pytest captures. An allocation
# that is too large returns null here as elsewhere: how that is met is among what is tested. How
# much memory the process takes is the sanitizer's doing, so nothing is said of that; the planner is
# Python alone.
PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
  UBSAN_OPTIONS=print_stacktrace=1 LD_PRELOAD=$preload "$env/bin/python" -m pytest -q -s \
  --deselect bench/test_manager.py::test_resident --ignore-glob "*/test_plan*" "$@"
