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
    """What is asked about an image, for example "How many apples are in this image? ..."."""
    return QUESTION.format(category=category)


def answer(count: int) -> str:
    """What the model is taught to say, for example "COUNT: 37"."""
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
    answer: list[int]  # "COUNT: 37" and the end-of-turn token, or what the model said of its own
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
    return Tokens(head, tail, *_answer_tokens(tokenizer, [*ids, tokenizer.eos_token_id]))


def with_answer(tokenizer, tokens: Tokens, ids: list[int]) -> Tokens:
    """The same prompt with another answer, for example the model's own (`answers.own_answers`).

    Where it has no digit, all its tokens stand for the number: a map is then that of the whole answer.
    """
    return Tokens(tokens.head, tokens.tail, *_answer_tokens(tokenizer, ids))


def _answer_tokens(tokenizer, ids: list[int]) -> tuple[list[int], list[bool]]:
    is_digit = [tokenizer.decode([token]).strip().isdigit() for token in ids]
    return ids, is_digit if any(is_digit) else [True] * len(ids)
