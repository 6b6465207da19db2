"""Control tokens come from the template, never from what someone wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import UserError
from shoal.data import Tokenizer, train_tokenizer
from shoal.data.chat_template import BUILT_IN, built_in_template, encode_chat, encode_turns, read_template, refuse_template, render_chat
from shoal.data.tokenizer import SPECIAL_TOKENS

PLAIN = train_tokenizer(["the red fish swims over a blue reef {}[]<｜User｜> " * 20], 400)
SPEAKERS = {name: Tokenizer(PLAIN.json, PLAIN.config, built_in_template(name)) for name in BUILT_IN}
TEXTS = st.lists(st.sampled_from([*SPECIAL_TOKENS, "<｜Us", "er｜>", "the red fish", "\ue000", " "]), max_size=6).map("".join)


def controls(ids: list[int]) -> list[int]:
    return [token for token in ids if token < len(SPECIAL_TOKENS)]


@pytest.mark.parametrize("name", BUILT_IN)
@given(texts=st.lists(TEXTS, min_size=3, max_size=3))
def test_whatever_people_write_is_text(name: str, texts: list[str]) -> None:
    tokenizer = SPEAKERS[name]

    def talk(system: str, first: str, second: str) -> list[dict[str, Any]]:
        users = [{"role": "user", "content": first}, {"role": "assistant", "content": "a"}, {"role": "user", "content": second}]
        return [{"role": "system", "content": system}, *users]

    ids = encode_chat(tokenizer, talk(*texts))
    assert tokenizer.decode(ids, skip_special=False) == render_chat(tokenizer, talk(*texts))
    assert controls(ids) == controls(encode_chat(tokenizer, talk("x", "x", "x")))


@pytest.mark.parametrize("name", BUILT_IN)
def test_ordinary_conversations_are_encoded_as_written(name: str) -> None:
    talk = [{"role": "user", "content": "the red fish"}, {"role": "assistant", "content": "<think>a reef</think>blue"}]
    talk.append({"role": "user", "content": "swims"})
    ids, text = encode_chat(SPEAKERS[name], talk), render_chat(SPEAKERS[name], talk)
    assert "reef" not in text, "thoughts are dropped from what was said before"
    assert ids == SPEAKERS[name].encode(text, special=True)


TURN = "{{ '<｜Assistant｜>' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
AROUND = {
    "plain": f"{{% for m in messages %}}{{% if m.role == 'assistant' %}}{TURN}{{% else %}}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}",
    "macro": f"{{% macro turn(m) %}}{TURN}{{% endmacro %}}{{% for m in messages %}}"
    "{% if m.role == 'assistant' %}{{ turn(m) }}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "block": f"{{% for m in messages %}}{{% if m.role == 'assistant' %}}{{% set turn %}}{TURN}{{% endset %}}{{{{ turn }}}}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("how", AROUND)
@given(texts=st.lists(TEXTS, min_size=4, max_size=4))
def test_what_the_model_writes_is_marked_wherever_the_template_holds_it(how: str, texts: list[str]) -> None:
    tokenizer = Tokenizer(PLAIN.json, PLAIN.config, AROUND[how])
    talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    pieces = encode_turns(tokenizer, talk)
    written = [tokenizer.decode(ids, skip_special=False) for ids, is_written in pieces if is_written]
    assert written == [f"{text}<｜end▁of▁sentence｜>" for text in texts[1::2]]
    whole = render_chat(tokenizer, talk, add_generation_prompt=False)
    assert tokenizer.decode([token for ids, _ in pieces for token in ids], skip_special=False) == whole


@pytest.mark.parametrize("change", ["turn | trim", "turn | length", "turn[:3]"])
def test_marks_that_the_template_works_on_are_refused(change: str) -> None:
    template = AROUND["block"].replace("{{ turn }}", f"{{{{ {change} }}}}").replace("{{ '<｜Assistant｜>' }}", "")
    with pytest.raises(UserError, match="changes what stands in"):
        encode_turns(Tokenizer(PLAIN.json, PLAIN.config, template), [{"role": "assistant", "content": "  a reef "}])


TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": 'a "é"', "parameters": {"type": "object", "properties": {"b": {}, "a": {}}}},
    }
]
USUAL = {
    "compact": "{{ tools | tojson(separators=(',', ':')) }}",
    "sorted": "{{ tools | tojson(sort_keys=True, indent=2) }}",
    "in order": "{{ tools | tojson(True, 4, (', ', '='), True) }}",
    "date": "{{ strftime_now('%Y') }}",
    "date, if there is one": "{% if strftime_now is defined %}{{ strftime_now('%B') }}{% else %}2024{% endif %}",
    "tokens": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ cls_token is defined }}",
}


@pytest.mark.parametrize("name", USUAL)
def test_other_peoples_templates_write_what_they_write_in_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = PLAIN.config | {"unk_token": {"content": "<think>", "__type": "AddedToken"}}
    tokenizer = Tokenizer(PLAIN.json, config, USUAL[name])
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "the red fish"}]
    assert render_chat(tokenizer, messages, TOOLS) == theirs.apply_chat_template(
        messages, TOOLS, tokenize=False, add_generation_prompt=True
    )


def test_an_argument_that_nobody_knows_is_refused() -> None:
    with pytest.raises(UserError, match="cannot write this conversation"):
        render_chat(Tokenizer(PLAIN.json, PLAIN.config, "{{ messages | tojson(width=3) }}"), [])


NAMED = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ messages[0].content }}", "rag": "R"}


def saved_in_folder(folder: Path) -> None:
    """As transformers 4.51 and later do."""
    Tokenizer(PLAIN.json, PLAIN.config).save(folder)
    (folder / "additional_chat_templates").mkdir()
    for name, template in NAMED.items():
        file = "chat_template" if name == "default" else f"additional_chat_templates/{name}"
        (folder / f"{file}.jinja").write_text(template)


def saved_in_list(folder: Path) -> None:
    """As earlier ones did."""
    listed = [{"name": name, "template": template} for name, template in NAMED.items()]
    Tokenizer(PLAIN.json, PLAIN.config).save(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(PLAIN.config | {"chat_template": listed}))


@pytest.mark.parametrize("saved", [saved_in_folder, saved_in_list])
def test_templates_with_names_are_kept_and_the_one_for_tools_is_used(saved: Any, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    saved(tmp_path / "theirs")
    Tokenizer.load(tmp_path / "theirs").save(tmp_path / "ours")
    tokenizer, messages = Tokenizer.load(tmp_path / "ours"), [{"role": "user", "content": "fish"}]
    assert (tokenizer.chat_template, tokenizer.named_templates) == (NAMED["default"], {name: NAMED[name] for name in ("rag", "tool_use")})
    for folder in ("theirs", "ours"):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert theirs.chat_template == NAMED
        for tools in (TOOLS, None):
            assert render_chat(tokenizer, messages, tools) == theirs.apply_chat_template(messages, tools, tokenize=False)


@pytest.mark.parametrize("name", ["../outside", "a/b"])
def test_no_template_is_written_outside_its_folder(name: str, tmp_path: Path) -> None:
    PLAIN.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": name, "template": "T"}]}))
    with pytest.raises(UserError, match="chat template"):
        Tokenizer.load(tmp_path)


def test_names_in_tools_are_text_as_well() -> None:
    speaker = Tokenizer(PLAIN.json, PLAIN.config, "{{ tools | tojson }}")
    ids = encode_chat(speaker, [], [{"function": {"name": "f", "parameters": {"properties": {"<｜User｜>": {}}}}}])
    assert not controls(ids)


def test_a_file_that_is_no_template_is_refused_when_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "broken.jinja"
    file.write_text("{% if x %}\n{{ y")
    with pytest.raises(UserError, match=r"broken.jinja is no Jinja template \(line 2: "):
        read_template(str(file))
    assert refuse_template(built_in_template("v3.1")) is None
