"""A small tokenizer of our own in the Qwen2 format, fitted to the few sentences one policy hears.

Byte-level BPE: any text still round-trips, and every word of the fitted sentences becomes one token, so that the prompt
of a small policy stays short.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from onbeat.embodiment.errors import OnbeatError

# How Qwen2 cuts text before merging: contractions, words with their leading space, single digits, punctuation, space.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
POLICY_TOKENS = (
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    "<quad>",
    "</quad>",
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<vision_start>",
    "<vision_end>",
    "<|action_start|>",
    "<|action_end|>",
    "<|state_start|>",
    "<|state_end|>",
    "<PROP_CONTEXT>",
    *(f"<ACTION_TOKEN_{i}>" for i in range(16)),
)
SPECIAL_TOKENS = CONTROL_TOKENS + POLICY_TOKENS
BYTES = 256
LONGEST_WORD = 64  # merges per distinct word are fewer than its bytes, so this bounds the vocabulary


class TextError(OnbeatError):
    """The sentences cannot be made into a tokenizer."""


def fit_tokenizer(sentences: Sequence[str]) -> Tokenizer:
    """A byte-level BPE in which every word of `sentences` is one token and every special token has its own id.

    Deterministic: the same sentences in the same order give the same ids. Raises TextError without sentences, or when
    one holds a special token's text, which a prompt must never smuggle in.
    """
    _check(sentences)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(sentences, _trainer(sentences))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the Qwen2 files into `folder`: tokenizer.json, vocab.json, merges.txt, added_tokens.json, two configs."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    vocabulary = tokenizer.get_vocab()
    added = {token: vocabulary[token] for token in SPECIAL_TOKENS}
    _write_json(folder / "added_tokens.json", added)
    _write_json(folder / "special_tokens_map.json", _roles())
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(added))


def _check(sentences: Iterable[str]) -> None:
    if not any(sentence.strip() for sentence in sentences):
        raise TextError("no sentence to fit a tokenizer to: name the policy's instructions in the configuration")
    for sentence in sentences:
        smuggled = next((token for token in SPECIAL_TOKENS if token in sentence), None)
        if smuggled:
            raise TextError(f"the sentence {sentence!r} contains the special token {smuggled}: remove it")


def _trainer(sentences: Sequence[str]) -> trainers.BpeTrainer:
    words = len({word for sentence in sentences for word in sentence.split()})
    return trainers.BpeTrainer(
        vocab_size=BYTES + LONGEST_WORD * (words + 1),
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )


def _roles() -> dict[str, Any]:
    return {
        "additional_special_tokens": list(CONTROL_TOKENS[1:]),
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }


def _tokenizer_config(added: dict[str, int]) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "added_tokens_decoder": {str(i): {"content": token, **flags} for token, i in added.items()},
        **_roles(),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
