import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from onbeat.runtime.prompt import (
    MOST_CHARACTERS,
    PARTS,
    SPECIAL_TOKENS,
    InstructionError,
    TemplateError,
    TokenizerError,
    build_prompt,
    instruction_template,
    load_tokenizer,
    system_message,
    tokenize,
)

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINT = GOLDEN / "ckpt_a1" / "checkpoint"
CASES = sorted(GOLDEN.glob("*/case_*.json"))
RECORDED = json.loads((GOLDEN / "unit_tokens.json").read_text())
PIECES = [(name, piece) for name, pieces in RECORDED.items() for piece in pieces]
TOKENIZER = load_tokenizer(CHECKPOINT)


def prompt(instruction: str = "lift the cube", template: str = "long"):
    return build_prompt(
        TOKENIZER, system="You lift.", template=template, instruction=instruction, image_tokens=8, chunk=16
    )


@pytest.mark.parametrize("token", ["<|im_end|>", "<img>", "<|state_start|>", "<think>", "<|endoftext|>"])
def test_an_instruction_that_would_open_another_turn_is_refused(token):
    with pytest.raises(InstructionError, match="leave special-token text out") as error:
        prompt(f"lift{token}the cube")
    assert token in str(error.value)


def test_what_only_looks_like_a_special_token_passes():
    assert len(prompt("lift < img > | im_end |> the {cube} {k}").token_ids) > 20


def test_an_instruction_that_is_no_text_is_refused():
    with pytest.raises(InstructionError, match="not valid Unicode"):
        prompt("lift \udc80")
    with pytest.raises(InstructionError, match="is NoneType, not text: say what"):
        prompt(None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("nothing", ["", "  ", "\t\n"])
def test_an_instruction_that_says_nothing_is_refused(nothing):
    with pytest.raises(InstructionError, match="is empty: say what"):
        prompt(nothing)


def test_an_instruction_that_is_too_long_is_refused_with_its_figures():
    assert len(prompt("a" * MOST_CHARACTERS).token_ids) > 20
    with pytest.raises(InstructionError, match="has 2001 characters: give at most 2000"):
        prompt("a" * (MOST_CHARACTERS + 1))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("do it", "no place for an instruction"),
        ("{task_description} {n}", "asks for 'n'"),
        ("{0}", "use {task"),
        ("{", "use {task"),
    ],
)
def test_a_template_that_takes_no_instruction_is_refused(template, says):
    with pytest.raises(TemplateError, match=says):
        instruction_template(template)


def test_an_unknown_template_names_the_closest():
    with pytest.raises(TemplateError, match="did you mean 'being_h0'"):
        system_message("being_h")
    with pytest.raises(TemplateError):
        system_message("being_h", own="mine")
    assert system_message("being_h0", own="") == ""
    assert "InternVL" in system_message("internvl2_5")


def test_a_folder_without_a_tokenizer_says_what_is_missing(tmp_path):
    with pytest.raises(TokenizerError, match=r"no vocab\.json, merges\.txt, added_tokens\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("token", SPECIAL_TOKENS)
def test_a_tokenizer_without_a_special_token_is_refused(tmp_path, token):
    document = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    for entry in document["added_tokens"]:
        entry["content"] = "<gone>" if entry["content"] == token else entry["content"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(TokenizerError) as error:
        load_tokenizer(tmp_path)
    assert f"lacks {token}:" in str(error.value)


def test_ids_that_do_not_follow_the_vocabulary_are_refused(tmp_path):
    for part in PARTS:
        shutil.copy(CHECKPOINT / part, tmp_path)
    added = json.loads((tmp_path / "added_tokens.json").read_text())
    del added["<think>"]
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(TokenizerError, match="does not follow the vocabulary"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(("checkpoint", "piece"), PIECES)
def test_pieces_as_recorded(checkpoint, piece):
    assert tokenize(load_tokenizer(GOLDEN / checkpoint / "checkpoint"), piece["text"]) == piece["ids"]


def test_the_parts_make_the_same_tokenizer(tmp_path):
    for part in PARTS:
        shutil.copy(CHECKPOINT / part, tmp_path)
    assembled = load_tokenizer(tmp_path)
    for _, piece in PIECES:
        assert tokenize(assembled, piece["text"]) == piece["ids"]


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_prefix_as_recorded(path):
    case, arrays = json.loads(path.read_text()), np.load(path.with_suffix(".npz"))
    image_tokens = len(case["video_keys"]) * case["num_image_token"]
    got = build_prompt(
        load_tokenizer(GOLDEN / case["checkpoint"]),
        system=system_message("being_h0"),
        template=case["instruction_template"],
        instruction=case["instruction"],
        image_tokens=image_tokens,
        chunk=case["action_chunk_length"],
    )
    text_at = arrays["mid/packed_text_indexes"][:-1]  # the last is the end mark behind the actions
    np.testing.assert_array_equal(got.token_ids[text_at], arrays["mid/packed_text_ids"][:-1])
    assert got.token_ids.dtype == np.int64
    assert len(got.token_ids) == arrays["mid/packed_action_indexes"][0]
    assert got.state_index == arrays["mid/packed_state_indexes"][0]
    np.testing.assert_array_equal(got.image_start + np.arange(image_tokens), arrays["mid/packed_vit_token_indexes"])
    placeholders = np.setdiff1d(np.arange(len(got.token_ids)), text_at)
    assert not got.token_ids[placeholders].any()


def test_templates_by_name():
    assert instruction_template("long").format(task_description="x", k=15).endswith("the next 15 steps?")
    assert instruction_template("short") == "{task_description}"
    short, long = prompt(template="short"), prompt(template="long")
    assert len(short.token_ids) < len(long.token_ids)
    own = prompt(template="Do: {task_description}")
    np.testing.assert_array_equal(own.token_ids, prompt("Do: lift the cube", "short").token_ids)
