"""The openai client against a real server: right answers, right errors, nothing lost or mixed."""

import concurrent.futures
import json

import httpx
import openai
import pytest

NAMES = ["base", "red", "green", "blue"]
GREEDY = {"temperature": 0, "max_tokens": 24}


def chat(text):
    return [{"role": "user", "content": text}]


def ask(client, model, text, **settings):
    settings = {**GREEDY, **settings}
    return client.chat.completions.create(model=model, messages=chat(text), **settings)


def said(response):
    return response.choices[0].message.content


def streamed(client, model, text, **settings):
    """Return the text of a stream, and its last chunk."""
    pieces, chunk = [], None
    for chunk in ask(client, model, text, stream=True, **settings):
        pieces += [choice.delta.content or "" for choice in chunk.choices]
    return "".join(pieces), chunk


def test_models_are_listed(served):
    models = {model.id: model for model in served.client.models.list()}
    assert list(models) == NAMES
    assert models["red"].parent == "base"
    assert served.client.models.retrieve("blue").id == "blue"
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("nobody")


@pytest.mark.parametrize("name", NAMES)
def test_each_name_answers_as_it_does_alone(served, alone, name):
    text = "What is 12 plus 30?"
    response = ask(served.client, name, text)
    assert said(response) == alone(name, chat(text))
    assert response.model == name
    assert response.usage.total_tokens == (
        response.usage.prompt_tokens + response.usage.completion_tokens
    )
    got, last = streamed(served.client, name, text, stream_options={"include_usage": True})
    assert got == said(response)
    assert last.usage == response.usage


def hammer(client, alone, count):
    """Send requests from 16 clients at once; return what is not as it should be."""
    asked = [(NAMES[i % 4], f"What is {i} plus {i % 7}?", i % 3 == 0) for i in range(count)]

    def one(name, text, is_streamed):
        if is_streamed:
            return streamed(client, name, text)[0]
        return said(ask(client, name, text))

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        got = list(pool.map(lambda each: one(*each), asked))
    return [
        (name, text, answer)
        for (name, text, _), answer in zip(asked, got, strict=True)
        if answer != alone(name, chat(text))
    ]


def test_many_at_once_are_what_they_are_alone(served, alone):
    assert hammer(served.client, alone, 32) == []


@pytest.mark.slow
def test_two_hundred_requests_from_sixteen_clients(served, alone):
    assert hammer(served.client, alone, 200) == []


def test_n_answers_have_seeds_of_their_own(served):
    settings = {"n": 3, "temperature": 1.2, "seed": 7, "max_tokens": 8}
    first = ask(served.client, "red", "Tell me.", **settings)
    texts = [choice.message.content for choice in first.choices]
    again = ask(served.client, "red", "Tell me.", **settings)
    assert [choice.message.content for choice in again.choices] == texts
    assert len(set(texts)) > 1
    second = ask(served.client, "red", "Tell me.", **{**settings, "n": 1, "seed": 8})
    assert said(second) == texts[1]
    chunks = {0: "", 1: "", 2: ""}
    for chunk in ask(served.client, "red", "Tell me.", stream=True, **settings):
        chunks[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(chunks.values()) == texts


def test_stop_strings_end_an_answer(served, alone):
    text = "Once upon a time"
    whole = alone("red", chat(text))
    stop = whole[4:7]
    assert len(stop) == 3
    response = ask(served.client, "red", text, stop=[stop, "never there"])
    assert said(response) == whole[: whole.index(stop)]
    assert response.choices[0].finish_reason == "stop"
    assert streamed(served.client, "red", text, stop=stop)[0] == said(response)
    assert ask(served.client, "red", text, max_tokens=1).choices[0].finish_reason == "length"


def test_logprobs(served):
    response = ask(served.client, "green", "Hi", logprobs=True, top_logprobs=2, max_tokens=4)
    entries = response.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == said(response)
    assert all(entry.logprob <= 0 for entry in entries)
    assert all(entry.top_logprobs[0].token == entry.token for entry in entries)  # greedy
    assert bytes(entries[0].bytes).decode() == entries[0].token


def test_plain_completions(served, alone):
    client, tokenizer = served.client, served.service.catalog.names()[0].tokenizer
    prompts = ["Once upon a time", "The sum of"]
    settings = {"temperature": 0, "max_tokens": 8, "logprobs": 1}
    response = client.completions.create(model="blue", prompt=prompts, **settings)
    expected = [alone("blue", prompt, 8) for prompt in prompts]
    assert [choice.text for choice in response.choices] == expected
    logprobs = response.choices[1].logprobs
    assert "".join(logprobs.tokens) == expected[1]
    assert logprobs.text_offset[1] == len(logprobs.tokens[0])
    assert list(logprobs.top_logprobs[0].values()) == logprobs.token_logprobs[:1]
    ids = tokenizer(prompts[0]).input_ids
    by_ids = client.completions.create(model="blue", prompt=ids, **settings)
    assert by_ids.choices[0].text == expected[0]
    pieces = client.completions.create(model="blue", prompt=ids, stream=True, **settings)
    assert "".join(piece.choices[0].text for piece in pieces) == expected[0]


CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
SAY = {"model": "base", "messages": chat("Hi")}


@pytest.mark.parametrize(
    ("path", "body", "status", "part"),
    [
        (CHAT, {**SAY, "model": "gpt-7"}, 404, {"code": "model_not_found", "param": "model"}),
        (CHAT, {"model": "base"}, 400, {"param": "messages"}),
        (CHAT, {**SAY, "messages": []}, 400, {"param": "messages"}),
        (CHAT, {**SAY, "temperature": -1}, 400, {"param": "temperature"}),
        (CHAT, {**SAY, "temperature": "hot"}, 400, {"param": "temperature"}),
        (CHAT, {**SAY, "top_p": 0}, 400, {"param": "top_p"}),
        (CHAT, {**SAY, "n": 17}, 400, {"param": "n"}),
        (CHAT, {**SAY, "max_tokens": 0}, 400, {"param": "max_tokens"}),
        (CHAT, {**SAY, "max_tokens": 5000}, 400, {"code": "context_length_exceeded"}),
        (CHAT, {**SAY, "messages": chat("long " * 900)}, 400, {"code": "context_length_exceeded"}),
        (CHAT, {**SAY, "logit_bias": {"3": 1}}, 400, {"code": "unsupported_parameter"}),
        (CHAT, {**SAY, "tempratur": 1}, 400, {"param": "tempratur"}),
        (CHAT, {**SAY, "stream_options": {}}, 400, {}),
        (CHAT, {**SAY, "messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, {}),
        (PLAIN, {"model": "base", "prompt": [99999]}, 400, {}),
        (PLAIN, {"model": "base", "prompt": []}, 400, {}),
        (PLAIN, {"model": "base", "prompt": "a", "echo": True}, 400, {"param": "echo"}),
        ("/v1/embeddings", {}, 404, {}),
    ],
)  # fmt: skip
def test_bad_requests_get_errors_of_openais_form(served, path, body, status, part):
    response = httpx.post(served.url + path, json=body)
    error = response.json()["error"]
    assert response.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert part.items() <= error.items()


def test_what_is_no_json_and_what_is_too_large(served):
    response = httpx.post(
        served.url + CHAT, content=b"{", headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]
    response = httpx.post(served.url + CHAT, content=b"x" * 100_001)
    assert response.status_code == 413
    assert httpx.get(served.url + CHAT).status_code == 405


def endless(service):
    """Let answers of `red` run until they are as long as they may be."""
    model = service.catalog.hold("red")
    model.stop_token_ids = frozenset()
    model.let_go()


def test_clients_that_leave_free_their_rows(make_server, wait_until):
    served = make_server(max_batch_size=2)
    endless(served.service)
    body = {"model": "red", "messages": chat("Go on."), "max_tokens": 200, "n": 2}
    with httpx.stream("POST", served.url + CHAT, json={**body, "stream": True}) as response:
        next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(served.url + CHAT, json=body, timeout=0.3)
    ask(served.client, "base", "What is 1 plus 1?")  # both rows were taken
    wait_until(lambda: "halfbyte_answers_running 0.0" in httpx.get(served.url + "/metrics").text)
    assert 'halfbyte_requests_total{model="red",outcome="cancelled"} 4.0' in (
        httpx.get(served.url + "/metrics").text
    )


def test_a_full_queue_and_a_late_answer(make_server):
    served = make_server(max_batch_size=1, max_queue=1, request_timeout=0.5)
    endless(served.service)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(served.client, "red", "Go on.", n=3)
    assert caught.value.body["code"] == "queue_full"
    assert caught.value.response.headers["retry-after"]
    with pytest.raises(openai.InternalServerError) as caught:
        ask(served.client, "red", "Go on.", max_tokens=None, n=2)
    assert caught.value.status_code == 503
    assert caught.value.body["code"] == "timeout"
    with pytest.raises(openai.APIError, match="time limit"):  # within a stream
        streamed(served.client, "red", "Go on.", max_tokens=None)


def test_adapters_come_go_and_are_swapped_under_load(make_server, adapters, alone):
    served = make_server(max_batch_size=4)
    client = served.client

    def post(verb, **body):
        return httpx.post(f"{served.url}/v1/{verb}_lora_adapter", json=body, timeout=60)

    texts = [f"What is {i} plus {i}?" for i in range(6)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        before = [pool.submit(ask, client, "red", text) for text in texts]
        swap = post("load", lora_name="red", lora_path="green", load_inplace=True)
        after = [pool.submit(ask, client, "red", text) for text in texts]
        got_before = [said(future.result()) for future in before]
        got_after = [said(future.result()) for future in after]
    assert swap.status_code == 200, swap.text
    for text, answer in zip(texts, got_before, strict=True):
        assert answer in (alone("red", chat(text)), alone("green", chat(text)))
    assert got_after == [alone("green", chat(text)) for text in texts]

    taken = post("load", lora_name="red", lora_path="blue")
    assert taken.status_code == 400
    assert "already been loaded" in taken.json()["error"]["message"]
    assert post("unload", lora_name="red").status_code == 200
    with pytest.raises(openai.NotFoundError):
        ask(client, "red", "Hi")
    assert post("unload", lora_name="red").status_code == 404
    assert post("unload", lora_name="base").status_code == 400
    assert post("load", lora_name="red", lora_path="red").status_code == 200
    assert said(ask(client, "red", texts[3])) == alone("red", chat(texts[3]))
    for outside in ("..", "/etc", str(adapters["red"].parent.parent), "nowhere"):
        assert post("load", lora_name="x", lora_path=outside).status_code == 400


def test_the_api_key(make_server, service):
    served = make_server(api_key="sesame", service=service)
    assert said(ask(served.client, "base", "What is 1 plus 1?"))
    for key in ("open", "sesame2"):
        response = httpx.post(
            served.url + CHAT, json=SAY, headers={"authorization": f"Bearer {key}"}
        )
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert "sesame" not in response.text
    assert httpx.get(served.url + "/v1/models").status_code == 401
    assert httpx.get(served.url + "/health").json() == {"status": "ok"}


def test_metrics_count(served):
    def value(name):
        lines = httpx.get(served.url + "/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = value("halfbyte_generation_tokens_total")
    response = ask(served.client, "blue", "Hi", max_tokens=3)
    grown = value("halfbyte_generation_tokens_total") - before
    assert grown == response.usage.completion_tokens
    assert value("halfbyte_answer_seconds_count") >= 1
    assert value("halfbyte_slots") == 8


def test_streams_are_server_sent_events(served):
    body = {**SAY, "stream": True, "max_tokens": 2}
    with httpx.stream("POST", served.url + CHAT, json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    first = json.loads(lines[0].removeprefix("data: "))
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"]["role"] == "assistant"
    last = json.loads(lines[-2].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] in ("stop", "length")
