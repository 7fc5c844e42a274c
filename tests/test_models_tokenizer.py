"""Tokenizers and chat templates: what a model reads, where it stops, and what is refused."""

import dataclasses
import json
import shutil

import pytest
import tiny

from basis_jax.config import Config, DataSection, SamplingSection
from basis_jax.data.encoding import encode_prompts
from basis_jax.data.problem import Problem
from basis_jax.model.sharding import make_mesh
from basis_jax.opening.rollout_setup import open_setup, report_turn_end
from basis_jax.weights import huggingface

THINKS = (  # as Qwen3's: an option that is there and false closes the thought
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}ok {% endif %}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + tiny.TEMPLATE
)
DROPS_SYSTEM = (
    "{% for m in messages if m['role'] != 'system' %}<s>{{ m['content'] }}</s>{% endfor %}"
)


@pytest.fixture
def tokenizer(tiny_folder):
    return huggingface.load_tokenizer(tiny_folder)


def prompt(tokenizer, *, text="1 + 2", **settings):
    section = DataSection(**settings)
    encoded = encode_prompts([Problem(prompt=text, answer="3")], section, tokenizer)
    return tokenizer.decode(encoded.tokens[0, : encoded.lengths[0]])


@pytest.mark.parametrize(
    ("value", "closed"), [(False, True), ("false", True), ("False", True), (True, False)]
)
def test_options_reach_the_template_with_their_meaning(tokenizer, value, closed):
    tokenizer.chat_template = THINKS
    found = prompt(tokenizer, chat_template_options={"enable_thinking": value})
    assert found == prompt(tokenizer) + "ok " * closed


@pytest.mark.parametrize("name", ["enable_thinkin", "tokenize", "chat_template"])
def test_an_option_that_the_template_does_not_read_is_refused(tokenizer, name):
    """``tokenize`` and ``chat_template`` are words of transformers, not of a template."""
    tokenizer.chat_template = THINKS + "{# tokenize chat_template #}"
    with pytest.raises(ValueError, match=f"has '{name}', which the tokenizer's chat template"):
        prompt(tokenizer, chat_template_options={name: False})


def test_options_in_text_format_are_refused(tokenizer):
    with pytest.raises(
        ValueError, match="no place for data.system_prompt, data.chat_template_options or a chat"
    ):
        prompt(tokenizer, prompt_format="text", chat_template_options={"enable_thinking": False})


@pytest.mark.parametrize(
    ("template", "settings", "words"),
    [
        (None, {}, "no chat template"),
        ("", {}, "no chat template"),
        ({"tool_use": tiny.TEMPLATE}, {}, "no chat template"),
        (NO_SYSTEM, {"system_prompt": "be kind"}, "roles system, user .System role not supported"),
        (DROPS_SYSTEM, {"system_prompt": "be kind"}, "leaves out the system message 'be kind'"),
        ("{% for %}", {}, "chat template refuses"),
        ("{{ messages[0]['role'] + 1 }}", {}, "chat template refuses"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_sentence_that_names_text(
    tokenizer, template, settings, words
):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=words) as raised:
        prompt(tokenizer, **settings)
    assert "give --data.prompt-format text" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_template_that_refuses_the_system_role_serves_without_one(tokenizer):
    tokenizer.chat_template = NO_SYSTEM
    assert prompt(tokenizer) == "<s>user\n1 + 2</s><s>assistant\n"


def adding(tokenizer, *, before=(), behind=()):
    """The tokenizer with these special tokens put around every text."""
    from tokenizers.processors import TemplateProcessing

    pieces = [*before, "$A", *behind]
    ids = [(t, tokenizer.convert_tokens_to_ids(t)) for t in (*before, *behind)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join(pieces), special_tokens=ids
    )
    return tokenizer


@pytest.mark.parametrize("prefix", ["", "<s>"])
def test_a_text_begins_with_one_bos(tokenizer, prefix):
    found = prompt(adding(tokenizer, before=["<s>"]), prompt_format="text", problem_prefix=prefix)
    assert found == "<s>1 + 2"


def test_a_chat_has_the_bos_of_its_template_alone(tokenizer):
    assert prompt(adding(tokenizer, before=["<s>"])).count("<s>") == 2


def test_a_tokenizer_that_ends_every_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match="EOS '</s>' behind every text.*add_eos_token"):
        prompt(adding(tokenizer, behind=["</s>"]), prompt_format="text")
    assert prompt(tokenizer, prompt_format="text", problem_suffix="</s>").endswith("</s>")


def warnings_of(tokenizer, *, ends, stop_tokens=(), **data):
    config = Config(
        run_dir="x", data=DataSection(**data), sampling=SamplingSection(stop_tokens=stop_tokens)
    )
    found = []
    report_turn_end(config, tokenizer, ends, found.append)
    return found


def test_a_turn_that_ends_with_no_eos_is_warned_of(tokenizer):
    """As a base model's does whose tokenizer has the template of its chat model."""
    start, end = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    assert warnings_of(tokenizer, ends=(end,)) == []
    (found,) = warnings_of(tokenizer, ends=(start,))
    assert "ends a turn with '</s>'" in found and "--sampling.stop-tokens '</s>'" in found
    assert warnings_of(tokenizer, ends=(start,), prompt_format="text") == []


def test_a_turns_end_is_its_first_special_token(tokenizer):
    start, end = tokenizer.convert_tokens_to_ids(["<s>", "</s>"])
    tokenizer.chat_template = tiny.TEMPLATE.replace("</s>", " \n.</s>\n<s>")
    assert warnings_of(tokenizer, ends=(end,)) == []
    assert len(warnings_of(tokenizer, ends=(start,))) == 1


def test_a_turns_end_of_several_plain_tokens_is_warned_of(tokenizer):
    tokenizer.chat_template = tiny.TEMPLATE.replace("</s>", "end\n")
    (found,) = warnings_of(tokenizer, ends=tuple(tokenizer.convert_tokens_to_ids(["</s>", "d"])))
    assert "ends a turn with 'end'" in found and "several tokens" in found
    for template in (
        tiny.TEMPLATE.replace("</s>", "\n"),
        "{{ messages[0]['content'] }}",
        "{{ raise_exception('only one message') }}",
        None,
    ):
        tokenizer.chat_template = template
        assert warnings_of(tokenizer, ends=()) == []


def test_a_setup_reports_the_turns_end_unless_a_stop_token_is_it(tiny_folder, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_folder, folder)
    tokenizer = huggingface.load_tokenizer(folder)
    tokenizer.chat_template = tiny.TEMPLATE.replace("</s>", "<s>")
    model_config, mesh = huggingface.read_model_config(folder), make_mesh()
    for stops, warnings in (((), 1), (("<s>",), 0)):
        found = []
        config = Config(run_dir="x", sampling=SamplingSection(stop_tokens=stops))
        with open_setup(config, folder, model_config, mesh, tokenizer, report=found.append) as made:
            assert (tokenizer.convert_tokens_to_ids("<s>") in made.eos_ids) == (warnings == 0)
        assert len(found) == warnings


def described(tiny_folder, path, **settings):
    """A copy of the tiny model's folder whose config.json has other settings."""
    shutil.copytree(tiny_folder, path)
    raw = json.loads((path / "config.json").read_text()) | settings
    (path / "config.json").write_text(json.dumps(raw))
    return path


def test_tokens_beyond_the_vocabulary_are_refused_when_the_tokenizer_is_loaded(
    tiny_folder, tmp_path
):
    size = len(huggingface.load_tokenizer(tiny_folder).get_vocab())
    huggingface.load_tokenizer(described(tiny_folder, tmp_path / "exact", vocab_size=size))
    folder = described(tiny_folder, tmp_path / "small", vocab_size=size - 2)
    with pytest.raises(
        ValueError, match=f"vocabulary of {size - 2} .*, 2 of them, from {size - 2} "
    ):
        huggingface.load_tokenizer(folder)


@pytest.mark.parametrize("wrong", [58, 10_000, -1, "2", 2.0, True, [2, 58], [[2]]])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_that_is_no_token_of_the_model_is_refused(tiny_folder, tmp_path, file, wrong):
    folder = described(tiny_folder, tmp_path / "model", vocab_size=58)
    tokenizer = huggingface.load_tokenizer(folder)
    path = folder / file
    raw = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(raw | {"eos_token_id": wrong}))
    with pytest.raises(ValueError, match=f"{file} has the eos_token_id .* no token of the model"):
        huggingface.eos_ids(folder, tokenizer)


def test_the_text_format_needs_no_template(tokenizer):
    tokenizer.chat_template = None
    assert prompt(tokenizer, prompt_format="text") == "1 + 2"
    data = dataclasses.replace(Config(run_dir="x").data, prompt_format="text")
    report_turn_end(Config(run_dir="x", data=data), tokenizer, (2,), pytest.fail)
