import pytest

from fsc147lib.model.prompt import answer, parse_count, parse_count_leniently, question, tokenize


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


@pytest.mark.parametrize(
    ("text", "count"),
    [("There are 37 apples.", 37), ("COUNT: 37.", 37), ("**COUNT: 37**", 37), ("count:37", 37), ("1,234 apples", 1234),
     ("<think>2 rows of 3, so 6?</think>\n\nCOUNT: 7", 7), ("37 apples, I count 37.", 37),
     ("COUNT: 37 (5 rows of 7, and 2)", 37), ("\\boxed{37}", 37), ("In IMG2 there are 37", 37),
     ("<think>There are 37", None), ("3 rows of 5", None), ("COUNT: 37\nCOUNT: 38", None), ("30-40", None),
     ("3.7", None), ("-2", None), ("1000000", None), ("9" * 400, None), ("٣٧", None), ("a dozen", None), ("", None)],
)  # fmt: skip
def test_a_lenient_parse_finds_the_one_number(text, count):
    assert parse_count_leniently(text) == count


@pytest.mark.parametrize(("text", "count"), [("There are 3", None), ("COUNT: 37", None), ("37 apples and", 37)])
def test_a_number_that_was_cut_off_is_not_read(text, count):
    assert parse_count_leniently(text, complete=False) == count


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
