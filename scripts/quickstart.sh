#!/usr/bin/env bash
# The main job on a fresh machine: set up, then compress, evaluate, measure, export and report on
# SmolLM2-135M-Instruct. Arguments go to `compress run`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/compress run recipes/quickstart.yaml "$@"
