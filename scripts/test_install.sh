#!/usr/bin/env bash
# The ways to install that the README's commands do not take: without build isolation and without a
# network, as on a machine that has everything already, and editable, rebuilt on import.
source "$(dirname "$0")/lib.sh"

env=$WORK/install
venv "$env" "$PYTHON"
"$env/bin/python" -m pip install -q -c constraints.txt \
  pybind11 scikit-build-core cmake ninja numpy typer rich
export PATH=$env/bin:$PATH
install=("$env/bin/python" -m pip install -q --no-index --no-build-isolation)

say "without build isolation and network"
"${install[@]}" .
pagedkv info

say "editable, rebuilt on import"
"${install[@]}" -e . -Ceditable.rebuild=true -Ceditable.verbose=false \
  -Cbuild-dir="$WORK/editable-build" -Ccmake.build-type=Debug
touch csrc/bindings/module.cpp "$WORK/before"
source=$("$env/bin/python" -c 'import pagedkv; print(pagedkv.__file__)')
[ "$source" = "$PWD/python/pagedkv/__init__.py" ] || die "not this checkout: $source"
# The built module, for the installed copy's time is cut to seconds.
native=$(echo "$WORK"/editable-build/_core.*.so)
[ "$native" -nt "$WORK/before" ] || die "not rebuilt after a source changed: $native"
echo "rebuilt $native"
