"""A tokenizer as Hugging Face's files; a SentencePiece model becomes `tokenizer.json` and what belongs to it.

Loaded with `transformers.AutoTokenizer`, the folder gives the ids of `maxllm.data.tokenizer`:

    tokenizer(text)["input_ids"]                   ours.encode(text): no BOS and no EOS added
    tokenizer.apply_chat_template(messages)        render(ours, messages), BOS included
      ... with add_generation_prompt=True          render_prompt(ours, messages)
    tokenizer.decode(ids, skip_special_tokens=True)    ours.decode(ids)

Three differences remain.
- A text that spells a special token ("<|im_end|>") becomes that control token here, as everywhere in Hugging
  Face, and plain pieces in ours. `tokenizer(text, split_special_tokens=True)` gives plain pieces here too,
  and is the call for text from outside.
- Byte pieces that are not valid UTF-8 (a character cut in half) decode to U+FFFD, not always equally many.
- Segmentations of equal probability under a unigram model (a run of one letter) are told apart by rounding
  only, which is float32 in SentencePiece and float64 here.
"""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers.models import BPE, Unigram

from maxllm.data.bpe import SETTINGS, FastTokenizer
from maxllm.data.spm import WORD_BOUNDARY, SpmTokenizer
from maxllm.data.tokenizer import BOS, CHAT_TEMPLATE, IM_END, PAD, SPECIAL_TOKENS, UNK, Tokenizer
from maxllm.errors import UserError

model_pb2: Any = sentencepiece_model_pb2  # generated at import: type checkers see nothing in it
Piece = model_pb2.ModelProto.SentencePiece


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, where there is one, the SentencePiece model.

    An imported tokenizer without a pad token, or with one that stops generation, is given the one that
    `Tokenizer.pad` found, which config.json and generation_config.json name too.

    Raises:
      UserError: the SentencePiece model is neither bpe nor unigram, or does not take text as it is.
    """
    padded = tokenizer
    if isinstance(tokenizer, FastTokenizer) and tokenizer.pad != tokenizer.special("pad_token"):
        spelled = tokenizer.reader.id_to_token(tokenizer.pad)
        padded = replace(tokenizer, config={**tokenizer.config, "pad_token": spelled})
    for name, content in padded.files.items():
        (folder / name).write_bytes(content)
    if isinstance(tokenizer, SpmTokenizer):
        fast_tokenizer(tokenizer).save(str(folder / "tokenizer.json"))
        config = json.dumps(tokenizer_config(), indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")


def padding(tokenizer: Tokenizer) -> dict[str, str]:
    """{"padding": a sentence} of a tokenizer without a token to pad with that does not stop generation."""
    pad = tokenizer.pad
    if pad not in tokenizer.stop_tokens:
        return {}
    return {
        "padding": f"{tokenizer.control_name(pad)} (id {pad}) both pads and stops generation: the vocabulary "
        "has no other special token for it, so other programs must mask by length"
    }


def tokenizer_config() -> dict[str, Any]:
    """What `transformers` reads besides tokenizer.json.

    EOS is the end of a turn, where generation stops; `generation_config.json` names </s> as well.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",  # tokenizer.json as it is; a name 4.x and 5.x know
        "bos_token": SPECIAL_TOKENS[BOS],
        "eos_token": SPECIAL_TOKENS[IM_END],
        "pad_token": SPECIAL_TOKENS[PAD],
        "unk_token": SPECIAL_TOKENS[UNK],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }


def as_fast(tokenizer: SpmTokenizer, day: datetime.date | None = None) -> FastTokenizer:
    """The tokenizer with the same ids that a chat template can be given; `day` is what that takes for today.

    Raises:
      UserError: as `fast_tokenizer` does.
    """
    return FastTokenizer(fast_tokenizer(tokenizer).to_str().encode(), SETTINGS, day)


def fast_tokenizer(tokenizer: SpmTokenizer) -> tokenizers.Tokenizer:
    """A tokenizer of the `tokenizers` library that segments every text as a SentencePiece model does.

    Pieces are written with real spaces instead of SentencePiece's U+2581, so text needs no normalizer and a
    literal U+2581 falls back to its bytes, as in `Tokenizer.encode`: every text comes back as it was.

    Raises:
      UserError: the SentencePiece model is neither bpe nor unigram, or does not take text as it is.
    """
    proto = model_pb2.ModelProto.FromString(tokenizer.model_bytes)
    check_takes_text_unchanged(proto)
    trainer = model_pb2.TrainerSpec
    match proto.trainer_spec.model_type:
        case trainer.BPE:
            model: BPE | Unigram = bpe_model(proto)
            cut_around = ""
        case trainer.UNIGRAM:
            model, cut_around = unigram_model(proto), unknown_letters(proto)
        case other:
            raise UserError(
                f"a SentencePiece model of type {trainer.ModelType.Name(other)} cannot be exported"
            )
    fast = tokenizers.Tokenizer(model)
    if cut_around:
        pattern = tokenizers.Regex(f"[{re.escape(cut_around)}]")
        fast.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return fast


def check_takes_text_unchanged(proto: Any) -> None:
    """Refuses a model that normalizes text: `spm.train` never makes one, another program may have."""
    spec = proto.normalizer_spec
    wrong = [
        f"{name}={found}"
        for name, found, wanted in (
            ("normalization_rule_name", spec.name, "identity"),
            ("add_dummy_prefix", spec.add_dummy_prefix, False),
            ("remove_extra_whitespaces", spec.remove_extra_whitespaces, False),
            ("escape_whitespaces", spec.escape_whitespaces, True),
            ("byte_fallback", proto.trainer_spec.byte_fallback, True),
            ("treat_whitespace_as_suffix", proto.trainer_spec.treat_whitespace_as_suffix, False),
        )
        if found != wanted
    ]
    if wrong:
        raise UserError(
            f"the tokenizer changes text before it is cut ({', '.join(wrong)}) and cannot be exported; "
            "use one that `maxllm prepare` trained"
        )


def piece_text(piece: Any) -> str:
    """A piece with real spaces."""
    return piece.piece.replace(WORD_BOUNDARY, " ")


def is_text(piece: Any) -> bool:
    """Whether a piece matches text: control tokens, <unk> and byte pieces never do."""
    return piece.type in (Piece.NORMAL, Piece.USER_DEFINED)


def bpe_model(proto: Any) -> BPE:
    """Merges from pieces: SentencePiece merges the neighbours whose union is the best-scored piece.

    Every way to cut a piece in two is a merge, in the order of the pieces. The user-defined piece (the line
    break) is a single character that no other piece has, so it takes part in none.
    """
    vocab = {piece_text(piece): index for index, piece in enumerate(proto.pieces)}
    scores = {piece_text(piece): piece.score for piece in proto.pieces if is_text(piece)}
    ranked = sorted(
        (piece_text(piece) for piece in proto.pieces if piece.type == Piece.NORMAL),
        key=lambda text: (-scores[text], vocab[text]),
    )
    merges = [
        (text[:cut], text[cut:])
        for text in ranked
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    return BPE(vocab=vocab, merges=merges, unk_token=SPECIAL_TOKENS[UNK], byte_fallback=True, fuse_unk=False)


def unigram_model(proto: Any) -> Unigram:
    """Pieces with their log probabilities.

    `tokenizers` would also match the spelling of a control or byte piece ("<0x0A>") in text. Their score is
    set so low that spelling them letter by letter wins where every letter is a piece; `unknown_letters` takes
    care of the rest.
    """
    lowest = min(piece.score for piece in proto.pieces if piece.type == Piece.NORMAL)
    longest = max(len(piece.piece) for piece in proto.pieces)
    never = (longest + 1) * (lowest - 10)
    vocab = [(piece_text(piece), piece.score if is_text(piece) else never) for piece in proto.pieces]
    return Unigram(vocab, unk_id=UNK, byte_fallback=True)


def unknown_letters(proto: Any) -> str:
    """The letters in which control and byte pieces are spelled, and which no text piece has.

    An unknown letter costs more than any piece, so "<0x0A>" with an unknown "<" would be a byte piece.
    Cutting the text around such letters prevents that, and nothing else, since no piece crosses the cut.
    """
    known = {letter for piece in proto.pieces if is_text(piece) for letter in piece_text(piece)}
    spelled = {letter for piece in proto.pieces if not is_text(piece) for letter in piece.piece}
    return "".join(sorted(spelled - known))
