"""The question, the answer "COUNT: 37", their tokens, and parsing of answers."""

import re
from dataclasses import dataclass, replace
from functools import partial

from .network import ModelError

NEUTRAL = "Write a general description of the image."  # of Zhang et al., "MLLMs Know Where to Look" (ICLR 2025)
IMAGE_TOKEN = "<|image_pad|>"
BEFORE, AFTER = "COUNT: ", ""  # text around the number of an answer; another form needs other weights
MAX_DIGITS = 6  # of an answer's longest number; FSC147's largest count is 3,701
_PARSED = re.compile(rf"{re.escape(BEFORE)}([0-9]{{1,{MAX_DIGITS}}}){re.escape(AFTER)}")


def question(category: str) -> str:
    """The question about an image."""
    return f"How many {category} are in this image? Answer with {BEFORE.strip()} and the number."


def answer(count: int) -> str:
    """The target answer, for example "COUNT: 37"."""
    return f"{BEFORE}{count}{AFTER}"


def parse_count(text: str) -> int | None:
    """The number in an answer of the form "COUNT: 37", with 1 to MAX_DIGITS digits; None for any other answer."""
    match = _PARSED.fullmatch(text.strip())
    return int(match.group(1)) if match else None


@dataclass(frozen=True)
class Tokens:
    """A prompt and its answer as token ids; the image comes between head and tail."""

    head: list[int]  # up to the image
    tail: list[int]  # after the image, up to where the answer begins
    answer: list[int]  # for example "COUNT: 37" and the end-of-turn token
    is_digit: list[bool]  # whether each answer token is part of the number; all are without one

    def with_answer(self, tokenizer, ids: list[int]) -> "Tokens":
        """The same prompt with another answer."""
        is_digit = [tokenizer.decode([token]).strip().isdigit() for token in ids]
        return replace(self, answer=ids, is_digit=is_digit if any(is_digit) else [True] * len(ids))


def longest_answer(tokenizer) -> int:
    """Tokens of the longest answer that parses, its end included."""
    return len(tokenizer.encode(answer(10**MAX_DIGITS - 1), add_special_tokens=False)) + 1


def number_tokens(tokenizer) -> tuple[list[int], list[int], int]:
    """Tokens before an answer's number, tokens of the ten digits, the first token behind; ModelError if digits join."""
    encode = partial(tokenizer.encode, add_special_tokens=False)
    before, digits = encode(BEFORE), [token for digit in "0123456789" for token in encode(digit)]
    after = [*encode(AFTER), tokenizer.eos_token_id]
    if encode(answer(9876543210)) != [*before, *reversed(digits), *after[:-1]]:
        raise ModelError("the tokenizer does not write each digit as one token: probabilities of counts need that")
    return before, digits, after[0]


def tokenize(tokenizer, category: str, count: int) -> Tokens:
    """Tokens of question and right answer in the model's chat template; ValueError if they cannot be made."""
    ids = tokenizer.encode(answer(count), add_special_tokens=False)
    head, tail = _around_image(tokenizer, chat_text(tokenizer, category))
    return Tokens(head, tail, [], []).with_answer(tokenizer, [*ids, tokenizer.eos_token_id])


def chat_text(tokenizer, category: str) -> str:
    """The question in the model's chat template, up to the answer; ValueError if the category has control tokens."""
    for token in tokenizer.get_added_vocab():
        if token in category:
            problem = f"the category {category!r:.60} holds {token}, which the model reads as a control token"
            raise ValueError(f"{problem}: name the objects in words")
    return _in_template(tokenizer, question(category))


def neutral_tail(tokenizer) -> list[int]:
    """Tokens of the neutral question, from the image to the answer."""
    return _around_image(tokenizer, _in_template(tokenizer, NEUTRAL))[1]


def _in_template(tokenizer, text: str) -> str:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _around_image(tokenizer, text: str) -> list[list[int]]:
    """Tokens before and after the image."""
    if text.count(IMAGE_TOKEN) != 1:
        made = f"the tokenizer's chat template made {text.count(IMAGE_TOKEN)} {IMAGE_TOKEN} of one image"
        raise ValueError(f"{made}: use the tokenizer that belongs to a Qwen3-VL model")
    return [tokenizer.encode(part, add_special_tokens=False) for part in text.split(IMAGE_TOKEN)]
