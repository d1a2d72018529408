#!/usr/bin/env bash
# Gets llama.cpp's vocabularies with their gold vectors out of the llama-cpp-python source package (77 MB, MIT; the
# vocabularies keep their owners' terms, so they are fetched, not committed).
#
#   tools/fetch_vocabularies.sh [FOLDER]      default .cache/vocabularies; prints the folder
set -euo pipefail
folder=${1:-.cache/vocabularies}
if [ ! -f "$folder/ggml-vocab-llama-spm.gguf" ]; then
  python=$(dirname "$0")/../.venv/bin/python
  command -v "$python" >/dev/null || python=python3
  partial=$(mktemp -d)
  trap 'rm -rf "$partial"' EXIT
  "$python" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$partial" \
    llama-cpp-python==0.3.36 >&2
  tar -xzf "$partial"/llama_cpp_python-*.tar.gz -C "$partial" --wildcards '*/models/ggml-vocab-*'
  mkdir -p "$folder"
  mv "$partial"/llama_cpp_python-*/vendor/llama.cpp/models/ggml-vocab-* "$folder"
fi
echo "$folder"
