"""Programs that speak to any server of OpenAI's API: litellm and lm-evaluation-harness, as they are, where they are installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from served import Serve, Served, write_model

from shoal.config import EngineOptions
from shoal.data import Tokenizer
from shoal.data.chat_template import built_in_template
from shoal.engine import Engine

pytestmark = pytest.mark.slow
HELLO = [{"role": "user", "content": "the red fish"}]
QUESTIONS = [("the red fish", [" swims over", " looks"], 0), ("a blue", [" reef", " fish"], 1), ("something to", [" Paris", " eat"], 1)]


@pytest.fixture(scope="module")
def base(serve: Serve) -> Iterator[Served]:
    with serve(engine=EngineOptions(max_running=8)) as served:
        yield served
        assert served.is_idle()


@pytest.fixture
def litellm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    return pytest.importorskip("litellm")


def test_litellm(litellm: Any, base: Served, chat: Served) -> None:
    there: dict[str, Any] = {"model": "openai/tiny", "api_base": f"{chat.url}/v1", "api_key": "none", "temperature": 0, "max_tokens": 12}
    whole = litellm.completion(messages=HELLO, **there)
    pieces = litellm.completion(messages=HELLO, stream=True, **there)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert whole.usage.completion_tokens > 0
    tools = [{"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "additionalProperties": False}}}]
    called = litellm.completion(messages=HELLO, tools=tools, tool_choice="required", **there | {"max_tokens": 200})
    assert called.choices[0].message.tool_calls[0].function.name == "stop"
    schema = {"type": "object", "properties": {"day": {"type": "boolean"}}, "required": ["day"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "day", "schema": schema, "strict": True}}
    formed = litellm.completion(messages=HELLO, response_format=form, **there | {"max_tokens": 200})
    assert isinstance(json.loads(formed.choices[0].message.content)["day"], bool)
    text = litellm.text_completion(**there | {"model": "text-completion-openai/tiny", "api_base": f"{base.url}/v1"}, prompt="the red")
    assert text.choices[0].text
    vectors = litellm.embedding(model="openai/tiny", api_base=f"{base.url}/v1", api_key="none", input=["the red"])
    assert len(vectors.data[0]["embedding"]) == 32
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=HELLO, **there | {"model": "openai/other"})


@pytest.fixture
def lm_eval(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    pytest.importorskip("lm_eval")
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    import lm_eval

    return lm_eval


def write_task(folder: Path, name: str, more: str) -> None:
    questions = [{"question": text, "choices": choices, "answer": answer} for text, choices, answer in QUESTIONS]
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    files = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'questions.jsonl'}\ntest_split: test\n"
    (folder / f"{name}.yaml").write_text(f"task: {name}\n{files}doc_to_text: '{{{{question}}}}'\n{more}")


def evaluate(lm_eval: Any, model: str, task: str, tmp_path: Path, arguments: dict[str, Any], **options: Any) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    report = lm_eval.simple_evaluate(model=model, model_args=arguments, tasks=[task], task_manager=manager, bootstrap_iters=0, **options)
    return report["samples"][task]


def test_lm_evaluation_harness_scores_as_the_engine_does(lm_eval: Any, base: Served, tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_task(tmp_path, "pick", "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: answer\ntarget_delimiter: ''\n")
    place = write_model(tmp_path / "tiny", tokenizer)
    arguments = {
        "model": "tiny",
        "base_url": f"{base.url}/v1/completions",
        "tokenizer": str(place),
        "max_length": 512,
        "add_bos_token": True,
    }
    samples = evaluate(lm_eval, "local-completions", "pick", tmp_path, arguments)
    engine = Engine(base.load().runner, tokenizer)
    for sample, (question, choices, _) in zip(samples, QUESTIONS, strict=True):
        for choice, found in zip(choices, sample["filtered_resps"], strict=True):
            prompt = tokenizer.encode(question, bos=True)
            scores = engine.score([tokenizer.encode(question + choice, bos=True)])[0]
            np.testing.assert_allclose(found[0], sum(scores[len(prompt) - 1 :]), atol=1e-3)


def test_lm_evaluation_harness_chats(lm_eval: Any, chat: Served, tokenizer: Tokenizer, tmp_path: Path) -> None:
    end = "generation_kwargs:\n  until: ['zzz']\n  max_gen_toks: 12\n"
    write_task(tmp_path, "say", f"output_type: generate_until\ndoc_to_target: '{{{{choices[answer]}}}}'\n{end}")
    arguments = {"model": "tiny", "base_url": f"{chat.url}/v1/chat/completions", "num_concurrent": 2}
    samples = evaluate(lm_eval, "local-chat-completions", "say", tmp_path, arguments, apply_chat_template=True)
    speaker = Tokenizer(tokenizer.json, tokenizer.config, built_in_template("v3.1"))
    assert speaker.chat_template
    assert all(isinstance(sample["resps"][0][0], str) for sample in samples)
    assert any(sample["resps"][0][0] for sample in samples)
