"""The official `openai` client, as it is, against a real server."""

from __future__ import annotations

from typing import Any

import numpy as np
import openai
import pytest
from served import Served
from test_conduct import ask

from shoal.config import SamplingOptions
from shoal.data import Tokenizer
from shoal.engine import Engine


@pytest.fixture(scope="module")
def client(base: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def talker(chat: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{chat.url}/v1", api_key="none", max_retries=0)


HELLO = [{"role": "user", "content": "the red fish"}]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.models.retrieve("gpt-9")


def test_completion_is_what_the_engine_says(base: Served, client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    engine = Engine(base.load().runner, tokenizer)
    expected = engine.generate(["the red"], SamplingOptions(max_tokens=12, temperature=0))[0]
    answer = client.completions.create(model="tiny", prompt="the red", max_tokens=12, temperature=0)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(expected.tokens)
    streamed = client.completions.create(model="tiny", prompt="the red", max_tokens=12, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected.text


def test_seed_repeats_and_choices_differ(client: openai.OpenAI) -> None:
    def texts(seed: int) -> list[str]:
        answer = client.completions.create(model="tiny", prompt="the", max_tokens=16, temperature=1.5, seed=seed, n=3)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.text for choice in answer.choices]

    first = texts(7)
    assert first == texts(7)
    assert len(set(first)) == 3
    assert first != texts(8)


def test_several_prompts_and_token_prompts(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    prompts = ["the red", "a blue reef"]
    texts = client.completions.create(model="tiny", prompt=prompts, max_tokens=5, temperature=0, n=2)
    ids = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    tokens = client.completions.create(model="tiny", prompt=ids, max_tokens=5, temperature=0, n=2)
    assert [choice.text for choice in texts.choices] == [choice.text for choice in tokens.choices]
    assert len(texts.choices) == 4
    assert texts.usage is not None
    assert texts.usage.prompt_tokens == sum(map(len, ids))


def test_echo_and_logprobs_score_a_text(base: Served, client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the red fish swims", bos=True)
    answer = client.completions.create(model="tiny", prompt=ids, max_tokens=1, temperature=0, echo=True, logprobs=2)
    report = answer.choices[0].logprobs
    assert report is not None
    scores = Engine(base.load().runner, tokenizer).score([ids])[0]
    assert report.token_logprobs is not None
    assert report.token_logprobs[0] is None
    np.testing.assert_allclose(np.array(report.token_logprobs[1:-1], float), scores, atol=1e-4)
    assert report.top_logprobs is not None
    assert all(len(top) == 2 for top in report.top_logprobs[1:])
    assert answer.choices[0].text.startswith("the red fish swims")
    only_read = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=1)
    assert only_read.choices[0].logprobs is not None
    assert only_read.choices[0].logprobs.token_logprobs == pytest.approx([None, *scores], abs=1e-4)


@pytest.mark.parametrize("echo", [False, True])
def test_offsets_say_where_tokens_begin_in_the_text(client: openai.OpenAI, echo: bool) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": "été 漢 red",
        "max_tokens": 40,
        "temperature": 1.5,
        "seed": 3,
        "logprobs": 0,
        "echo": echo,
    }
    choice = client.completions.create(**asked).choices[0]
    assert choice.logprobs is not None
    tokens, offsets = choice.logprobs.tokens, choice.logprobs.text_offset
    assert tokens is not None
    assert offsets is not None
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    whole = [(token, at) for token, at in zip(tokens, offsets, strict=True) if not token.startswith(("bytes:", "<｜"))]
    assert whole
    for token, at in whole:
        # Bytes that turn out to be no character are shown as one by the token behind them.
        assert choice.text[at:].removeprefix("\ufffd").startswith(token)
    streamed = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]
    assert [at for part in streamed if part is not None for at in part.text_offset or ()] == offsets


def test_null_is_a_field_left_away(base: Served) -> None:
    plain: dict[str, Any] = {"prompt": "the red", "max_tokens": 5, "temperature": 0}
    nulls = dict.fromkeys(("stream", "echo", "n", "stop", "ignore_eos", "logprobs", "suffix", "experts", "model"))
    wanted, found = (
        ask(f"{base.url}/v1/completions", body) for body in (plain, plain | nulls | {"stream_options": {"include_usage": None}})
    )
    assert found[0] == wanted[0] == 200
    assert found[1]["choices"] == wanted[1]["choices"]


def test_prompt_logprobs(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the red", bos=True)
    answer = client.completions.create(model="tiny", prompt=ids, max_tokens=1, extra_body={"prompt_logprobs": 1})
    report = answer.choices[0].model_extra["prompt_logprobs"]
    assert report[0] is None
    assert [str(token) in entry for token, entry in zip(ids[1:], report[1:], strict=True)] == [True] * (len(ids) - 1)


def test_stop_bias_and_penalties(client: openai.OpenAI) -> None:
    plain = client.completions.create(model="tiny", prompt="the", max_tokens=20, temperature=0).choices[0].text
    stop = plain[len(plain) // 2 :][:2]
    stopped = client.completions.create(model="tiny", prompt="the", max_tokens=20, temperature=0, stop=[stop]).choices[0]
    assert stopped.text == plain[: plain.index(stop)]
    assert stopped.finish_reason == "stop"
    forced = client.completions.create(model="tiny", prompt="the", max_tokens=4, temperature=0, logit_bias={"300": 100}, logprobs=0)
    varied = client.completions.create(
        model="tiny", prompt="the", max_tokens=20, temperature=0, logit_bias={"300": 100, "301": 100}, frequency_penalty=2, logprobs=0
    )
    assert len(set(forced.choices[0].logprobs.tokens)) == 1  # type: ignore[union-attr,arg-type]
    assert len(set(varied.choices[0].logprobs.tokens)) == 2  # type: ignore[union-attr,arg-type]


def test_embeddings(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="tiny", input=["the red fish", "a reef"])
    plain = client.embeddings.create(model="tiny", input="a reef", encoding_format="float")
    assert len(answer.data) == 2
    np.testing.assert_allclose(answer.data[1].embedding, plain.data[0].embedding, atol=1e-5)
    assert len(plain.data[0].embedding) == 32


def test_a_base_model_refuses_to_chat(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="base model"):
        client.chat.completions.create(model="tiny", messages=HELLO)


def test_chat(talker: openai.OpenAI) -> None:
    whole = talker.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=12, temperature=0)
    assert whole.choices[0].message.role == "assistant"
    assert whole.usage is not None
    stream = talker.chat.completions.create(
        model="tiny", messages=HELLO, max_completion_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_chat_logprobs_and_choices(talker: openai.OpenAI) -> None:
    answer = talker.chat.completions.create(model="tiny", messages=HELLO, max_tokens=6, temperature=0, n=2, logprobs=True, top_logprobs=3)
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        for token in choice.logprobs.content:
            assert len(token.top_logprobs) == 3
            assert token.top_logprobs[0].token == token.token  # greedy
            assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
        written = b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content)
        assert (choice.message.content or "") in written.decode(errors="replace")


def test_stopping_to_listen_frees_everything(base: Served, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="tiny", prompt=["the"] * 40, max_tokens=450, temperature=1, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert base.pages_in_use() > 0
    stream.close()
    assert base.is_idle()
    assert base.host.engine.stats().finished["abort"] >= 1


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"temperature": -1}, "temperature"),
        ({"n": 0}, "n: "),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[5, 100000]]}, "vocabulary"),
        ({"prompt": "fish " * 2000}, "shorten"),
        ({"best_of": 3}, "best_of"),
    ],
)
def test_bad_requests_are_named(client: openai.OpenAI, fields: dict[str, object], match: str) -> None:
    with pytest.raises(openai.BadRequestError, match=match) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "the", **fields})  # type: ignore[call-overload]
    assert caught.value.body["type"] == "invalid_request_error"  # type: ignore[index]
