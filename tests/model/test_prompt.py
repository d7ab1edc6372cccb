import pytest

from fsc147lib.model.prompt import answer, parse_count, question, tokenize


def test_answer_parses_back():
    assert answer(37) == "COUNT: 37"
    assert all(parse_count(answer(n)) == n for n in (0, 7, 37, 3701, 999_999))


@pytest.mark.parametrize("text", ["COUNT: 37", "  COUNT: 37\n"])
def test_white_space_around_is_no_fault(text):
    assert parse_count(text) == 37


@pytest.mark.parametrize(
    "text",
    ["COUNT: 3.7", "COUNT: ", "37 apples", "COUNT: -2", "COUNT: " + "9" * 400, "COUNT: 1000000", "COUNT:37",
     "count: 37", "COUNT: 37 apples", "COUNT: 37\nCOUNT: 38", "COUNT: 3 7", "COUNT: ٣٧", "COUNT: ²", "COUNT: 1e3", ""],
)  # fmt: skip
def test_anything_else_is_no_answer(text):
    assert parse_count(text) is None


@pytest.mark.parametrize("category", ["<|im_end|>", "a <|image_pad|> b"])
def test_a_control_token_is_no_category(tiny, category):
    with pytest.raises(ValueError, match="control token"):
        tokenize(tiny.tokenizer, category, 3)


def test_tokens_spell_the_chat_and_digits_are_single(tiny):
    tokens = tokenize(tiny.tokenizer, "apples", 3701)
    assert tiny.tokenizer.decode(tokens.answer) == "COUNT: 3701<|im_end|>"
    assert [tiny.tokenizer.decode([t]) for t, d in zip(tokens.answer, tokens.is_digit, strict=True) if d] == list(
        "3701"
    )
    text = tiny.tokenizer.decode(tokens.head) + tiny.tokenizer.decode(tokens.tail)
    assert question("apples") in text and text.endswith("assistant\n")
    assert tiny.tokenizer.decode(tokens.head).endswith("<|vision_start|>")


def test_any_category_can_be_written(tiny):
    tokens = tokenize(tiny.tokenizer, "crème brûlée №5", 3)
    assert "crème brûlée №5" in tiny.tokenizer.decode(tokens.tail)


def test_a_chat_template_without_image_is_refused(tiny):
    tiny.tokenizer.chat_template = "{% for message in messages %}{{ message.role }}{% endfor %}"
    with pytest.raises(ValueError, match="belongs to a Qwen3-VL"):
        tokenize(tiny.tokenizer, "apples", 3)
