"""The question, the answer "COUNT: 37", its tokens, and strict parsing of what comes back.

Left out: padding and tensors (`collate`), and the model's chat template, which belongs to its
tokenizer.
"""

import re
from dataclasses import dataclass

QUESTION = "How many {category} are in this image? Answer with COUNT: and the number."
ANSWER = "COUNT: {count}"
IMAGE_TOKEN = "<|image_pad|>"

MAX_DIGITS = 6
"""Longest number that counts as an answer; FSC147's largest count, 3,701, has four digits."""

_PARSED = re.compile(rf"COUNT: ([0-9]{{1,{MAX_DIGITS}}})")


def question(category: str) -> str:
    """The question about an image, for example "How many apples are in this image? ..."."""
    return QUESTION.format(category=category)


def answer(count: int) -> str:
    """The target answer, for example "COUNT: 37"."""
    return ANSWER.format(count=count)


def parse_count(text: str) -> int | None:
    """The number in an answer, or None.

    Strict: the whole text, but for white space around it, must be "COUNT: " and 1 to MAX_DIGITS
    digits.  A number that has to be guessed out of other words is no answer.
    """
    match = _PARSED.fullmatch(text.strip())
    return int(match.group(1)) if match else None


@dataclass(frozen=True)
class Tokens:
    """One prompt and its answer as token ids; the image is still to be put between head and tail."""

    head: list[int]  # up to the image
    tail: list[int]  # after the image, up to where the answer begins
    answer: list[int]  # "COUNT: 37" and the end-of-turn token
    is_digit: list[bool]  # for each answer token: is it a part of the number?


def tokenize(tokenizer, category: str, count: int) -> Tokens:
    """Put question and answer into the model's own chat template.

    Prompt and answer are tokenised apart, as they are when the model answers by itself.

    Args:
        tokenizer: a tokenizer with a chat template and an end-of-turn token (`eos_token`).
        category: what to count, for example "apples".
        count: the right answer.

    Raises:
        ValueError: the chat template does not put exactly one image token into the prompt.
    """
    content = [{"type": "image"}, {"type": "text", "text": question(category)}]
    messages = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if text.count(IMAGE_TOKEN) != 1:
        raise ValueError(
            f"the tokenizer's chat template made {text.count(IMAGE_TOKEN)} {IMAGE_TOKEN} of one image: "
            "use the tokenizer that belongs to a Qwen3-VL model"
        )
    head, tail = (tokenizer.encode(part, add_special_tokens=False) for part in text.split(IMAGE_TOKEN))
    ids = tokenizer.encode(answer(count), add_special_tokens=False)
    is_digit = [tokenizer.decode([token]).strip().isdigit() for token in ids]
    return Tokens(head, tail, ids + [tokenizer.eos_token_id], is_digit + [False])
