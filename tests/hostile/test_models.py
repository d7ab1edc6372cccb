"""Model folders that are damaged or lie: each is refused at the door, in a sentence that names what is wrong."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from fsc147lib.__main__ import main
from fsc147lib.model.load import load_model

pytestmark = pytest.mark.medium

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
EMBEDDINGS = "model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "model"
    load_model("tiny-random").save(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A sound model's folder, to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")


def in_json(file, **changes):
    """Put values into a JSON file; None removes a key, and a dict goes into the one that is there."""

    def change(folder):
        content = json.loads((folder / file).read_text())
        for key, value in changes.items():
            if value is None:
                content.pop(key)
            else:
                content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
        (folder / file).write_text(json.dumps(content))

    return change


def in_weights(function):
    """Put other tensors into model.safetensors."""

    def change(folder):
        tensors = function(load_file(folder / "model.safetensors"))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def without(*files):
    return lambda folder: [(folder / file).unlink() for file in files]


def holding(file, content):
    return lambda folder: (folder / file).write_text(content)


def without_image_token(folder):
    for name in TOKENIZER:
        (folder / name).write_text((folder / name).read_text().replace("<|image_pad|>", "<|image_qad|>"))


def with_more_tokens(folder):
    tokenizer = load_model("tiny-random").tokenizer
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder)


def no_pad(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({key: v for key, v in json.loads(path.read_text()).items() if key != "pad_token"}))


def with_nan(tensors):
    tensors["model.visual.merger.linear_fc1.weight"][3, 3] = np.nan
    return tensors


def custom_code(folder):
    """A model type that transformers does not know, with code of its own beside it."""
    (folder / "code.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    changes = {"model_type": "evil", "auto_map": {"AutoConfig": "code.Config"}}
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))


def custom_tokenizer(folder):
    (folder / "code.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    path = folder / "tokenizer_config.json"
    changes = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["code.Evil", "code.Evil"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_adapter(folder):
    """What peft saves, into the folder of the model itself."""
    get_peft_model(load_model("tiny-random").network, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)


DAMAGES = {  # what is done to the folder, and what is said of it
    "no visual tensors": (in_weights(lambda t: {k: v for k, v in t.items() if "visual" not in k}),
                          "tensors that the weights lack: 63, such as model.visual"),
    "no name matches": (in_weights(lambda t: {f"x.{k}": v for k, v in t.items()}), "the weights lack: 110"),
    "one too many": (in_weights(lambda t: {**t, "lm_tail.weight": t[EMBEDDINGS].clone()}),
                     "tensors that the model has no place for: 1, such as lm_tail.weight"),
    "another shape": (in_weights(lambda t: {**t, EMBEDDINGS: t[EMBEDDINGS][:-1].clone()}),
                      f"another shape than config.json gives them: 1, such as {EMBEDDINGS}"),
    "NaN": (in_weights(with_nan), "NaN or infinity: 1, such as model.visual.merger.linear_fc1.weight"),
    "torn weights": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:1000]),
                     "cannot load"),
    "no weights": (without("model.safetensors"), "cannot load"),
    "no tokenizer": (without(*TOKENIZER), "the tokenizer has no <|image_pad|>: is tokenizer.json in its place"),
    "no tokenizer.json": (without("tokenizer.json"), "instantiate the backend tokenizer"),
    "torn tokenizer": (holding("tokenizer.json", "{"), "cannot load"),
    "no pad token": (no_pad, "the tokenizer has no pad token"),
    "no end token": (in_json("tokenizer_config.json", eos_token=None), "the tokenizer has no end-of-turn token"),
    "no image token": (without_image_token, "the tokenizer has no <|image_pad|>"),
    "another image token": (in_json("config.json", image_token_id=7), "image_token_id in config.json is 7"),
    "more tokens than embeddings": (with_more_tokens, "tokens in tokenizer.json, but"),
    "broken template": (holding("chat_template.jinja", "{% for %}"), "the chat template"),
    "failing template": (holding("chat_template.jinja", "{{ raise_exception('no') }}"), "the chat template"),
    "deaf template": (holding("chat_template.jinja", "<|image_pad|>"), "leaves out the question"),
    "template without image": (holding("chat_template.jinja", "{{ messages[0].content[1].text }}"), "<|image_pad|>"),
    "patch size": (in_json("preprocessor_config.json", patch_size=14), "patch_size is 14 in the preprocessor, but 16"),
    "merge size": (in_json("preprocessor_config.json", merge_size=4), "merge_size is 4 in the preprocessor, but 2"),
    "deviation 0": (in_json("preprocessor_config.json", image_std=[0.5, 0.0, 0.5]),
                    "image_std (0.5, 0.0, 0.5) must"),
    "two colours": (in_json("preprocessor_config.json", image_mean=[0.5, 0.5]), "image_mean (0.5, 0.5) and"),
    "size upside down": (in_json("preprocessor_config.json", size={"shortest_edge": 9999999}),
                         "shortest_edge <= longest_edge is needed"),
    "no preprocessor": (without("preprocessor_config.json"), "cannot load"),
    "config is a list": (holding("config.json", "[]"), "cannot load"),
    "config is torn": (holding("config.json", '{"model_type": "qw'), "cannot load"),
    "another model": (in_json("config.json", model_type="bert"), "'bert' model"),
    "heads that do not divide": (in_json("config.json", vision_config={"num_heads": 3}), "3 heads do not divide"),
    "custom code": (custom_code, "'evil' model"),
    "FP8": (in_json("config.json", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
            "weights are quantised (fp8, says quantization_config in config.json): give the model in "
            "bfloat16 or float32 that they were made from\n"),
    "bitsandbytes": (in_json("config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
                     "weights are quantised (bitsandbytes, says quantization_config in config.json)"),
    "AWQ": (in_json("config.json", quantization_config={"quant_method": "awq", "bits": 4}), "quantised (awq, says"),
    "GPTQ of the text alone": (in_json("config.json", text_config={"quantization_config": {"quant_method": "gptq"}}),
                               "quantised (gptq, says"),
    "quantised in another way": (in_json("config.json", quantization_config={"load_in_8bit": True}),
                                 "quantised (no quant_method, says"),
    "an adapter beside the weights": (with_adapter, "an adapter lies beside the weights (adapter_config.json): merge "
                                      "it into them (peft's merge_and_unload) and save, or move its files away\n"),
    "recipe": (holding("recipe.json", '{"learning_rate": NaN}'), "recipe.json is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_refused(folder, root, damage, capsys, monkeypatch):
    change, sentence = DAMAGES[damage]
    change(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question is asked"))
    status = main(["evaluate", "--data", str(root), "--model", str(folder), "--limit", "2"])
    printed = capsys.readouterr()
    assert status == 2 and printed.err.startswith("ModelError: "), printed
    assert sentence in printed.err
    assert str(folder) in printed.err and "Traceback" not in printed.err
    assert not (folder / "ran").exists()


def test_a_tokenizer_s_own_code_is_not_run(folder, monkeypatch):
    """What is left of it is a tokenizer.json like another."""
    custom_tokenizer(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question is asked"))
    assert load_model(folder).tokenizer.eos_token == "<|im_end|>"
    assert not (folder / "ran").exists()


def test_a_tied_head_may_be_left_out_or_written(folder):
    in_weights(lambda tensors: {**tensors, "lm_head.weight": tensors[EMBEDDINGS].clone()})(folder)
    network = load_model(folder).network
    assert torch.equal(network.lm_head.weight, network.model.language_model.embed_tokens.weight)
