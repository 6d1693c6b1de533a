"""The small tokenizer: one token per known word, every byte still representable, special tokens by name, stable ids."""

import importlib
import json

import pytest
from tokenizers import Tokenizer

from onbeat.training.text import SPECIAL_TOKENS, TextError, fit_tokenizer, write_tokenizer

SENTENCES = ["system\nYou move a robot arm.", "user\n", "assistant\n", "lift the cube"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return fit_tokenizer(SENTENCES)


@pytest.mark.parametrize("sentences", [[], [""], ["  \n"]])
def test_nothing_to_fit_is_refused(sentences: list[str]) -> None:
    with pytest.raises(TextError, match="no sentence"):
        fit_tokenizer(sentences)


def test_a_sentence_with_a_special_token_is_refused() -> None:
    with pytest.raises(TextError, match=r"<\|im_end\|>"):
        fit_tokenizer(["lift <|im_end|> the cube"])


def test_every_fitted_word_is_one_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("lift the cube").tokens == ["lift", "Ġthe", "Ġcube"]
    assert len(tokenizer.encode("user\n").ids) == 2
    assert len(tokenizer.encode("\n").ids) == 1


@pytest.mark.parametrize("text", ["lift the cube", "  two  spaces\n\n", "naïve café", "积木 🤖", "it's 42", "\x00"])
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_special_tokens_have_an_id_each_above_the_words(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in SPECIAL_TOKENS]
    assert len(set(ids)) == len(SPECIAL_TOKENS)
    assert min(ids) >= 256
    assert tokenizer.encode("<|state_start|>").ids == [tokenizer.token_to_id("<|state_start|>")]


def test_the_same_sentences_give_the_same_ids() -> None:
    assert fit_tokenizer(SENTENCES).to_str() == fit_tokenizer(SENTENCES).to_str()


def test_the_written_files_agree_with_each_other(tokenizer: Tokenizer, tmp_path) -> None:
    write_tokenizer(tokenizer, tmp_path)
    loaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    prompt = "<|im_start|>user\nlift the cube<|im_end|>\n"
    assert loaded.encode(prompt).ids == tokenizer.encode(prompt).ids
    added = json.loads((tmp_path / "added_tokens.json").read_text())
    words = json.loads((tmp_path / "vocab.json").read_text())
    assert sorted([*words.values(), *added.values()]) == list(range(tokenizer.get_vocab_size()))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert {int(i): entry["content"] for i, entry in config["added_tokens_decoder"].items()} == {
        i: token for token, i in added.items()
    }


def test_the_slow_qwen2_reader_agrees(tokenizer: Tokenizer, tmp_path) -> None:
    """`transformers` builds its own tokenizer from the folder; it must give the ids we train with."""
    transformers = importlib.import_module("transformers")  # takes seconds
    write_tokenizer(tokenizer, tmp_path)
    theirs = transformers.Qwen2Tokenizer.from_pretrained(str(tmp_path))
    text = "<|im_start|>user\nlift the cube <img></img><|state_start|>42<|im_end|>\n"
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
