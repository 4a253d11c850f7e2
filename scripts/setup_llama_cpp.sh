#!/usr/bin/env bash
# Makes .llama-cpp/bin: llama-server, llama-quantize and llama-perplexity, built for this CPU from
# the llama.cpp sources that llama-cpp-python ships on PyPI. Needs CMake, a C++17 compiler and pip.
# An interrupted build goes on where it was. Prints the path of llama-server.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

root="$PWD/.llama-cpp"
stamp="$root/.stamp"
wanted="$(sha256sum < scripts/setup_llama_cpp.sh | cut -d' ' -f1)"
tools=(llama-server llama-quantize llama-perplexity)
if [[ -f $stamp && "$(cat "$stamp")" == "$wanted" && -x $root/bin/llama-server ]]; then
  echo "$root/bin/llama-server"
  exit 0
fi

release="llama_cpp_python-0.3.36"
sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
python=".venv/bin/python"
[[ -x $python ]] || python="${PYTHON:-python3}"
for tool in cmake c++; do
  command -v "$tool" >/dev/null || {
    echo "setup: $tool is missing; on Debian: apt-get install cmake g++" >&2
    exit 2
  }
done

mkdir -p "$root/bin"
archive="$root/$release.tar.gz"
source="$root/$release/vendor/llama.cpp"
if [[ ! -f $source/.unpacked ]]; then
  echo "setup: fetching the sources of llama.cpp (77 MB)" >&2
  [[ -f $archive ]] || "$python" -m pip --quiet --disable-pip-version-check download --no-deps \
    --no-binary llama-cpp-python --dest "$root" "${release/_python-/_python==}" \
    2> >(grep -v '^WARNING: Location' >&2)
  echo "$sha256  $archive" | sha256sum --check --quiet
  tar -xzf "$archive" -C "$root"
  rm "$archive"
  touch "$source/.unpacked"
fi

# Without AMX: ggml's kernels for it end the process (SIGSEGV) when a quantized model is loaded, seen
# on a Xeon under virtualisation with this release; `--no-repack` avoids them too, but every other
# repacked kernel with them.
amx=()
if c++ -mno-amx-tile -E -x c++ /dev/null >/dev/null 2>&1; then
  amx=(-DCMAKE_C_FLAGS="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    -DCMAKE_CXX_FLAGS="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16")
fi

# No web interface (its assets would be downloaded), no TLS, and static libraries: the programs can
# be moved. GGML_NATIVE uses every instruction that this CPU has.
echo "setup: building llama.cpp for this CPU" >&2
cmake -S "$source" -B "$root/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
  -DGGML_NATIVE=ON -DGGML_CCACHE=OFF -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_TESTS=OFF \
  -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF \
  -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF "${amx[@]}" >"$root/cmake.log" 2>&1 || {
  tail -n 20 "$root/cmake.log" >&2
  exit 1
}
cmake --build "$root/build" -j "$(nproc)" --target "${tools[@]}" >"$root/build.log" 2>&1 || {
  tail -n 20 "$root/build.log" >&2
  exit 1
}
for tool in "${tools[@]}"; do
  install -s "$root/build/bin/$tool" "$root/bin/$tool"
done
cp "$source/LICENSE" "$root/LICENSE"
"$root/bin/llama-server" --version >"$root/version.txt" 2>&1
rm -rf "$root/build" "${root:?}/$release"
echo "$wanted" >"$stamp"
echo "$root/bin/llama-server"
