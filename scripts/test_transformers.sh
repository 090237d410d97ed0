#!/usr/bin/env bash
# test_transformers.sh [VERSION=5.0.0]: the tests of the integration on another transformers than the
# pinned one. Its environment lies over PYTHON's, so that torch and pagedkv are those.
source "$(dirname "$0")/lib.sh"

version=${1:-5.0.0}
env=$WORK/transformers-$version
venv "$env" "$PYTHON"
where='import sysconfig; print(sysconfig.get_path("purelib"))'
echo "import site; site.addsitedir('$("$PYTHON" -c "$where")')" \
  >"$("$env/bin/python" -c "$where")/below.pth"
"$env/bin/python" -m pip install -q "transformers==$version"
"$env/bin/python" -c 'import torch, transformers as t; print(f"torch {torch.__version__}, transformers {t.__version__}")'
"$env/bin/python" -m pytest -q tests/python/test_transformers*.py
