"""The words around an observation: the tokenizer of a checkpoint, its templates, and the prefix they make."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from onbeat.embodiment.errors import OnbeatError
from onbeat.embodiment.slots import suggest

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
IMAGES_START, IMAGES_END = "<img>", "</img>"
STATE_START, STATE_END = "<|state_start|>", "<|state_end|>"
NEWLINE = "\n"
PARTS = ("vocab.json", "merges.txt", "added_tokens.json")
SPECIAL_TOKENS = (TURN_START, TURN_END, IMAGES_START, IMAGES_END, STATE_START, STATE_END)
MOST_CHARACTERS = 2000
PLACEHOLDER = 0  # stands where the network puts image and state embeddings

SYSTEM_MESSAGES = {
    "being_h0": "You are Being-H0, a helpful and harmless AI assistant developed by BeingBeyond.",
    "internvl2_5": (
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    ),
    "internlm2-chat": (
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
    ),
}
INSTRUCTION_TEMPLATES = {
    "long": "According to the instruction '{task_description}', what's the micro-step actions in the next {k} steps?",
    "short": "{task_description}",
}

# How Qwen2 splits text before byte-pair encoding.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TokenizerError(OnbeatError):
    """A folder whose tokenizer cannot be read or lacks tokens that the prompt is made of."""


class TemplateError(OnbeatError):
    """An unknown template, or one that does not take an instruction."""


class InstructionError(OnbeatError):
    """An instruction that is no text, says nothing, is too long, or has special tokens, which could end its turn."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The whole prefix. token_ids: (N,) int64, 0 where image and state embeddings stand; it ends before the actions.

    image_start: index of the first of the V x tokens_per_view image tokens. state_index: index of the state token.
    """

    token_ids: NDArray[np.int64]
    image_start: int
    state_index: int


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint: tokenizer.json, or else vocab.json, merges.txt and added_tokens.json.

    Raises TokenizerError, which names what is missing.
    """
    tokenizer = _read_tokenizer(folder)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    missing = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        raise TokenizerError(f"the tokenizer in {folder} lacks {', '.join(missing)}: use that of the checkpoint")
    if len(tokenize(tokenizer, NEWLINE)) != 1:
        raise TokenizerError(f"a line break is not one token in {folder}: use the tokenizer of the checkpoint")
    return tokenizer


def tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of one piece of text, nothing added."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def system_message(template: str, own: str | None = None) -> str:
    """A checkpoint's own system message, or that of the template it names. Raises TemplateError for an unknown one."""
    if template not in SYSTEM_MESSAGES:
        raise TemplateError(f"unknown template '{template}': {suggest(template, SYSTEM_MESSAGES)}")
    return own if own is not None else SYSTEM_MESSAGES[template]


def instruction_template(name_or_text: str) -> str:
    """A template by name ("long", "short"), or a text of one's own with {task_description} in it, and {k} if wanted."""
    text = INSTRUCTION_TEMPLATES.get(name_or_text, name_or_text)
    try:
        marked = text.format(task_description="\0", k=1)
    except (KeyError, IndexError, ValueError) as error:
        raise TemplateError(f"template '{text}' asks for {error}: use {{task_description}} and {{k}} only") from None
    if "\0" not in marked:
        raise TemplateError(f"template '{text}' has no place for an instruction: put {{task_description}} into it")
    return text


def check_instruction(tokenizer: Tokenizer, instruction: str) -> None:
    """Raise InstructionError when the instruction is no text of a fitting length, or has special tokens in it."""
    if not isinstance(instruction, str):
        raise InstructionError(f"the instruction is {type(instruction).__name__}, not text: say what is to be done")
    if not instruction.strip():
        raise InstructionError("the instruction is empty: say what is to be done")
    if len(instruction) > MOST_CHARACTERS:
        raise InstructionError(f"the instruction has {len(instruction)} characters: give at most {MOST_CHARACTERS}")
    try:
        instruction.encode("utf-8")
    except UnicodeEncodeError:
        raise InstructionError("the instruction is not valid Unicode: type it again") from None
    added = tokenizer.get_added_tokens_decoder()
    found = sorted({added[i].content for i in tokenize(tokenizer, instruction) if i in added})
    if found:
        raise InstructionError(f"the instruction contains {', '.join(found)}: leave special-token text out")


def build_prompt(
    tokenizer: Tokenizer, *, system: str, template: str, instruction: str, image_tokens: int, chunk: int
) -> Prompt:
    """The prefix of one observation.

    image_tokens: V x tokens_per_view. template: see `instruction_template`. chunk: rows of an action chunk. Every piece
    is tokenised alone; one pair of image marks stands around all views. Raises InstructionError, TemplateError.
    """
    check_instruction(tokenizer, instruction)
    asked = instruction_template(template).format(task_description=instruction, k=chunk)
    opening = _pieces(tokenizer, TURN_START, f"system\n{system}", TURN_END, NEWLINE, TURN_START, "user\n", IMAGES_START)
    state = _pieces(tokenizer, IMAGES_END, STATE_START)
    closing = _pieces(tokenizer, STATE_END, asked, TURN_END, NEWLINE, TURN_START, "assistant\n")
    image_start = len(opening)
    state_index = image_start + image_tokens + len(state)
    ids = opening + [PLACEHOLDER] * image_tokens + state + [PLACEHOLDER] + closing
    return Prompt(np.array(ids, np.int64), image_start, state_index)


def _pieces(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    return [token for piece in pieces for token in tokenize(tokenizer, piece)]


def _read_tokenizer(folder: Path) -> Tokenizer:
    whole, parts = folder / "tokenizer.json", [folder / name for name in PARTS]
    try:
        if whole.exists():
            return Tokenizer.from_file(str(whole))
        if all(path.exists() for path in parts):
            return _assemble(*parts)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise TokenizerError(f"the tokenizer in {folder} cannot be read ({error}): copy it again") from error
    absent = ", ".join(path.name for path in parts if not path.exists())
    raise TokenizerError(f"{folder} has no tokenizer.json, and no {absent}: copy the tokenizer of the checkpoint there")


def _assemble(vocabulary: Path, merges: Path, added: Path) -> Tokenizer:
    """A Qwen2 tokenizer from its parts: NFC, Qwen2's split, byte-level byte-pair encoding."""
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = sorted(_ids(added).items(), key=lambda item: item[1])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text, _ in special])
    moved = [text for text, index in special if tokenizer.token_to_id(text) != index]
    if moved:
        raise ValueError(f"the id of {moved[0]} does not follow the vocabulary")
    return tokenizer


def _ids(path: Path) -> dict[str, int]:
    return json.loads(path.read_text(encoding="utf-8"))
