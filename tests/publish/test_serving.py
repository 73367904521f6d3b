"""`looped serve` answers as generate does at the depth that each request asks for, and no request harms another."""

import collections
import concurrent.futures
import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import fields

import httpx2
import openai
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from data_builders.tokenizers import hop_tokenizer, train_byte_bpe
from looplab.cli import main
from looplab.publish.limits import LIMITS, Limits
from looplab.publish.serving import Server, check_kind, listen
from looplab.publish.serving_jobs import Service, begun
from looplab.publish.serving_requests import CHAT, COMPLETION, GENERATION
from looplab.publish.serving_threads import Turns, at_work
from looplab.runs.models import load_model
from modeling_looped import attach
from toys import make_model, open_gates

pytestmark = pytest.mark.slow

TOKENIZER = hop_tokenizer(num_entities=20, num_relations=4)
TOKENIZER.chat_template = "{% for message in messages %}{{ message['content'] }} <ans>{% endfor %}"
QUESTION = "e3 r1 r2"
ASKS = {
    "completions": {"prompt": QUESTION, "max_tokens": 5},
    "chat/completions": {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 5},
}
GREEDY = {"num_loops": 64, "max_tokens": 1024}
KINDS = {
    "per_loop": {},
    "sections": {"num_prelude_layers": 1, "num_coda_layers": 1, "loop_connection": "inject_add"},
    "first": {"kv_sharing": "first"},
    "last": {"kv_sharing": "last"},
    "mean": {"kv_sharing": "mean"},
    "gated": {"kv_sharing": "gated", "prefill_chunk": 2},
    "noise": {"state_init": "normal", "loop_connection": "inject_add"},
    "streams": {"loop_connection": "hyper", "num_streams": 2, "max_num_loops": 64},
    "gate": {"exit_gate": True},
    "learned": {"position_embedding": "learned"},
    "frozen": None,
}


def make(kind: str):
    """A tiny model whose words are those of TOKENIZER; it never ends a reply by itself."""
    if kind == "frozen":
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
        config = LlamaConfig(**sizes, vocab_size=len(TOKENIZER), max_position_embeddings=2048, initializer_range=0.15)
        model = LlamaForCausalLM(config).eval()
        model.generation_config = GenerationConfig(pad_token_id=0)
        return attach(model, window=(1, 2), num_loops=5)
    model = open_gates(make_model(vocab_size=len(TOKENIZER), **KINDS[kind]))
    model.generation_config.num_loops = 5
    return model


class Client:
    """Asks a service that runs in this process, on a free port of the loopback interface."""

    def __init__(self, service: Service, address: tuple[str, int]):
        self.service, self.address = service, address
        self.http = httpx2.Client(base_url="http://{}:{}".format(*address), timeout=60)

    def post(self, body, endpoint: str = "completions", **headers) -> httpx2.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | {
            name.replace("_", "-"): each for name, each in headers.items()
        }
        return self.http.post(f"/v1/{endpoint}", content=content, headers=headers)

    def ask(self, endpoint: str = "completions", **body) -> dict:
        response = self.post(ASKS[endpoint] | body, endpoint)
        assert response.status_code == 200, response.text
        return response.json()

    def text(self, **body) -> str:
        return self.ask(**body)["choices"][0]["text"]

    def events(self, endpoint: str = "completions", **body) -> list[dict]:
        """What a stream says, without its last line."""
        response = self.post(ASKS[endpoint] | {"stream": True} | body, endpoint)
        assert response.headers["content-type"].startswith("text/event-stream"), response.text
        *lines, last = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        assert last == "[DONE]"
        return [json.loads(line) for line in lines]

    @contextlib.contextmanager
    def busy(self, **body):
        """A greedy request at work, whose first token was sent; its client leaves at the end."""
        before = set(self.service.jobs)
        with self.http.stream(
            "POST", "/v1/completions", json={"prompt": QUESTION, "stream": True} | GREEDY | body
        ) as it:
            lines = it.iter_lines()
            assert next(lines).startswith("data: ")
            [job] = self.service.jobs - before
            yield job
        self.wait(lambda: job not in self.service.jobs)

    @staticmethod
    def wait(until) -> None:
        for _ in range(600):
            if until():
                return
            time.sleep(0.05)
        raise AssertionError("it did not come to pass")


@contextlib.contextmanager
def served(model, tokenizer=TOKENIZER, **limits):
    service = Service(model, tokenizer, "toy", Limits(**limits))
    with listen("127.0.0.1", 0) as listener:
        address = listener.getsockname()
        server = Server(service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        client = Client(service, address)
        try:
            client.wait(lambda: server.started)
            with client.http:
                yield client
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def plain():
    with served(make("per_loop")) as client:
        yield client


def generated(model, prompt=QUESTION, tokens=5, tokenizer=TOKENIZER, seed=None, **settings) -> str:
    """What generate says."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    settings = {"do_sample": False} | settings
    if seed is not None:
        torch.manual_seed(seed)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **settings)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


# ---- answers


def requests_of_all_sorts(number: int, halts: bool) -> list[dict]:
    """Prompts, depths, rules, greedy and sampled: no two alike."""
    draw = torch.Generator().manual_seed(0)

    def below(bound: int) -> int:
        return int(torch.randint(bound, (1,), generator=draw))

    requests = []
    for index in range(number):
        relations = " ".join(f"r{below(4)}" for _ in range(1 + below(6)))
        request = {"prompt": f"e{below(20)} {relations}", "num_loops": 1 + index % 16, "max_tokens": 2 + below(5)}
        if halts and index % 4 == 1:
            request["halting"] = {"rule": "latent", "threshold": 0.3}
        if index % 4 == 2:
            request |= {"seed": index, "temperature": 1.5, "top_p": 0.9}
        requests.append(request)
    return requests


@pytest.mark.parametrize(("kind", "number"), [(kind, 64 if kind == "per_loop" else 10) for kind in KINDS])
def test_concurrent_requests_of_any_depth_answer_as_generate_does_alone(kind, number):
    model, alone = make(kind), make(kind)
    requests = requests_of_all_sorts(number, halts=kind != "frozen")
    expected = []
    for request in requests:
        sampling = {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 0} if "seed" in request else {}
        depth = {name: request[name] for name in ("num_loops", "halting") if name in request}
        expected.append(
            generated(alone, request["prompt"], request["max_tokens"], seed=request.get("seed"), **sampling, **depth)
        )
    with served(model) as client, concurrent.futures.ThreadPoolExecutor(number) as clients:
        answers = list(clients.map(lambda request: client.text(**request), requests))
    assert answers == expected
    assert len(set(expected)) > number // 2


@pytest.mark.parametrize("endpoint", ASKS)
def test_the_depth_is_the_requests_own_or_the_models(plain, endpoint):
    model = make("per_loop")

    def says(**body) -> str:
        [choice] = plain.ask(endpoint, **body)["choices"]
        assert (choice["index"], choice["finish_reason"]) == (0, "length")
        return choice["text"] if endpoint == "completions" else choice["message"]["content"]

    expected = {loops: generated(model, num_loops=loops) for loops in (3, 5, 8)}
    assert len(set(expected.values())) == 3
    in_config = {"num_loops": 8, "pad_token_id": 0}
    assert says() == expected[5]
    assert says(num_loops=3) == expected[3]
    assert says(generation_config=json.dumps(in_config)) == expected[8]
    assert says(generation_config=GenerationConfig(**in_config).to_json_string()) == expected[8]
    assert says(generation_config=json.dumps(in_config), num_loops=3) == expected[3]
    assert says() == expected[5]


def test_usage_counts_tokens_and_loops(plain):
    usage = plain.ask(num_loops=7)["usage"]
    assert usage == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9, "loops": 35}
    halted = plain.ask(num_loops=7, halting={"rule": "latent", "threshold": 1e9})["usage"]
    assert halted["loops"] == 2 * 5


def test_token_ids_are_a_prompt_as_they_are(plain):
    ids = TOKENIZER(QUESTION)["input_ids"]
    assert plain.text(prompt=ids) == plain.text(prompt=QUESTION) != plain.text(prompt=ids[:-1])


@pytest.mark.parametrize("endpoint", ASKS)
def test_a_stream_says_what_the_whole_answer_does(plain, endpoint):
    *events, last, usage = plain.events(endpoint, stream_options={"include_usage": True}, num_loops=3)
    texts = [choice["delta"].get("content", "") if "delta" in choice else choice["text"]
             for event in events for choice in event["choices"]]  # fmt: skip
    assert "".join(texts) == generated(make("per_loop"), num_loops=3)
    assert len([text for text in texts if text]) == 5
    assert last["choices"][0]["finish_reason"] == "length"
    assert (usage["choices"], usage["usage"]) == ([], plain.ask(endpoint, num_loops=3)["usage"])
    assert len({event["id"] for event in [*events, last, usage]}) == 1


def test_characters_of_several_tokens_and_stops_are_streamed_as_they_end():
    """Of a model that says any bytes, and with stop strings at every place of its answer."""
    tokenizer = train_byte_bpe(["a loop reads, a loop writes"] * 2, 262)
    model = make_model(vocab_size=len(tokenizer), pad_token_id=0)
    options = {"prompt": "a loop", "max_tokens": 24}
    with served(model, tokenizer) as client:
        for seed in range(3):
            sampled = options | {"seed": seed, "temperature": 2.0}
            whole = client.text(**sampled)
            assert whole == generated(
                model, "a loop", 24, tokenizer, seed, do_sample=True, temperature=2.0, top_k=0, num_loops=3
            )
            for start in range(0, len(whole) - 3, 3):
                stops = [whole[start : start + 3], "never said"]
                expected = whole[: min(whole.find(stop) for stop in stops if stop in whole)]
                answer = client.ask(**sampled, stop=stops)["choices"][0]
                assert (answer["text"], answer["finish_reason"]) == (expected, "stop")
                events = client.events(**sampled, stop=stops)
                assert "".join(event["choices"][0]["text"] for event in events) == expected
                assert events[-1]["choices"][0]["finish_reason"] == "stop"


@given(st.text("ab", max_size=9), st.text("ab", min_size=1, max_size=4))
@settings(derandomize=True, max_examples=100, deadline=None)
def test_what_may_become_a_stop_string_is_held_back(text, stop):
    assert begun(text, stop) == max(n for n in range(len(stop)) if text.endswith(stop[:n]))


def test_an_end_token_ends_the_answer(plain):
    ids = TOKENIZER.convert_tokens_to_ids(plain.text().split())
    answer = plain.ask(generation_config=json.dumps({"eos_token_id": ids[2], "num_loops": 5}))
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == ids.index(ids[2]) + 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_client_of_openai_reads_it(plain):
    with openai.OpenAI(base_url=str(plain.http.base_url.join("/v1")), api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["toy"]
        deep = {"extra_body": {"num_loops": 8}, "max_tokens": 5, "model": "toy"}
        expected = generated(make("per_loop"), num_loops=8)
        assert client.completions.create(prompt=QUESTION, **deep).choices[0].text == expected
        messages = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
        stream = client.chat.completions.create(messages=messages, stream=True, **deep)
        assert "".join(event.choices[0].delta.content or "" for event in stream) == expected
        with pytest.raises(openai.BadRequestError, match="num_loops must be an integer from 1 to 64"):
            client.completions.create(prompt=QUESTION, model="toy", extra_body={"num_loops": 0})


# ---- requests that are refused

OUT_OF_RANGE = [0, -1, 2.5, 3.0, "x", "3", True, [3], {}, 10**7, 65, 2**62]
REFUSED = [
    *(({"num_loops": each}, "num_loops must be an integer from 1 to 64") for each in OUT_OF_RANGE),
    *(({"generation_config": json.dumps({"num_loops": each})}, "num_loops must be") for each in OUT_OF_RANGE),
    *(({"max_tokens": each}, "max_tokens must be an integer from 1 to") for each in (0, -1, 1.5, "5", True, 1025)),
    *(({"halting": each}, "halting must be") for each in (3, True, [], [["kl"]], {"rule": [1]}, {"rule": {"a": {}}})),
    *(({"halting": each}, "halting has no rule") for each in ("", "kll", {}, {"kl_threshold": 1}, {"rule": 3})),
    ({"halting": {"rule": "kl", "threshold": 1}}, "has no threshold 'threshold'"),
    ({"halting": {"rule": "kl", "kl_threshold": -1}}, "must be a number >= 0"),
    ({"halting": {"rule": "kl", "kl_threshold": "x"}}, "must be a number >= 0"),
    ({"halting": "q_exit"}, "exit gate, which this model does not have"),
    ({"num_lops": 3}, "unknown field 'num_lops'; did you mean num_loops"),
    ({"x" * 10**5: 3}, "unknown field 'xxxxx"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": " \n"}, "prompt is empty"),
    ({"prompt": None}, "has no prompt"),
    ({"prompt": []}, "prompt must be one string or one list"),
    ({"prompt": ["e3"]}, "prompt must be one string or one list"),
    ({"prompt": [[3, 4]]}, "prompt must be one string or one list"),
    ({"prompt": [3, True]}, "prompt must be one string or one list"),
    ({"prompt": [3, 27]}, "token id from 0 to 26"),
    ({"prompt": [-1]}, "token id from 0 to 26"),
    ({"prompt": "e3 zz r1 e99"}, "unknown words ['zz', 'e99']"),
    ({"prompt": "e3 \ud800"}, "surrogate"),
    ({"prompt": [3] * 5000}, "5000 tokens, more than 4096"),
    ({"prompt": "e3 " * 5000}, "tokens, more than 4096"),
    *(({"temperature": each}, "temperature must be") for each in (-1, 2.1, 1e-30, "0", True)),
    *(({"top_p": each}, "top_p must be") for each in (-0.1, 1.1, "1")),
    *(({"seed": each}, "seed must be") for each in (1.5, "1", False)),
    *(({"stop": each}, "stop must be") for each in ("", [""], ["a"] * 5, "a" * 300, 3, [3])),
    *(({name: 2}, f"{name} is not supported here") for name in ("n", "best_of", "logprobs", "presence_penalty")),
    ({"echo": True}, "echo is not supported here"),
    ({"logprobs": 0}, "logprobs is not supported here"),
    ({"logit_bias": {"5": 100}}, "logit_bias is not supported here"),
    ({"stream": 1}, "stream must be true or false"),
    ({"stream_options": {"include_usage": True}}, "stream_options is for a request with stream"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options must be"),
    ({"generation_config": {}}, "generation_config must be a string"),
    ({"generation_config": "{"}, "generation_config is not valid JSON"),
    ({"generation_config": "[1]"}, "generation_config must be a JSON object"),
    ({"generation_config": '{"num_loops": 3, "num_loops": 4}'}, "named twice"),
    ({"generation_config": '{"num_beams": 100000}'}, "unknown field 'num_beams'"),
    ({"generation_config": '{"max_new_tokens": 100000}'}, "max_new_tokens must be an integer from 1 to 1024"),
    ({"generation_config": '{"eos_token_id": []}'}, "eos_token_id must be"),
    ({"generation_config": '{"eos_token_id": [99]}'}, "eos_token_id must be"),
    ({"generation_config": '{"cache_implementation": "static"}'}, "unknown field"),
    ({"generation_config": '{"temperature": 0.0, "do_sample": true}'}, "temperature"),
    *(({"generation_config": json.dumps(each), "max_tokens": 40}, "leaves no token to go on with") for each in (
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 1, "do_sample": True},
        {"eos_token_id": list(range(27)), "min_new_tokens": 1, "do_sample": True},
    )),
]  # fmt: skip
BODIES = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"3", "must be a JSON object"),
    (b"null", "must be a JSON object"),
    (b"[]", "must be a JSON object"),
    (b"\xff\xfe\xff", "not valid JSON"),
    (b'{"seed": NaN}', "not finite"),
    (b'{"seed": -Infinity}', "not finite"),
    (b'{"temperature": 1e999}', "not finite"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "beyond 64 bits"),
    (b'{"seed": 9223372036854775808}', "beyond 64 bits"),
    (b"[" * 10**5, "nested too deeply"),
    (b'{"halting": ' + b"[" * 900 + b"]" * 900 + b"}", "halting must be"),
    (b'{"halting": ' + b'{"a":' * 10**4, "nested too deeply"),
    (b'{"prompt": "e3", "prompt": "e4"}', "named twice"),
]
MESSAGES = [
    *(({"messages": each}, "messages must be") for each in ([], "hello", {}, 3)),
    ({"messages": None}, "has no messages"),
    ({"messages": [3]}, "messages[0] must be"),
    ({"messages": [{"role": "user"}]}, "messages[0] must be"),
    ({"messages": [{"role": "user", "content": "e3", "name": "x"}]}, "messages[0] must be"),
    ({"messages": [{"role": "robot", "content": "e3"}]}, "messages[0].role must be one of"),
    ({"messages": [{"role": [], "content": "e3"}]}, "messages[0].role must be one of"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content must be a string"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc"}}]}]}, "content"),
    ({"messages": [{"role": "user", "content": "zz"}]}, "messages has unknown words ['zz']"),
    ({"max_tokens": 3, "max_completion_tokens": 3}, "not both"),
    ({"tools": [{"type": "function"}]}, "tools is not supported here"),
    ({"response_format": {"type": "json_object"}}, "response_format is not supported here"),
    ({"prompt": "e3"}, "unknown field 'prompt'"),
]  # fmt: skip


def check_refusal(response, sentence: str = "", status: int = 400) -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert sentence in error["message"]
    assert error["message"].rstrip().endswith((".", "?"))
    assert len(error["message"]) < 600
    assert "Traceback" not in response.text


@pytest.mark.parametrize(("fields", "sentence"), REFUSED)
def test_a_field_that_is_wrong_is_refused_in_a_sentence(plain, fields, sentence):
    check_refusal(plain.post(ASKS["completions"] | fields), sentence)


@pytest.mark.parametrize(("body", "sentence"), BODIES)
def test_a_body_that_is_no_json_object_is_refused(plain, body, sentence):
    check_refusal(plain.post(body), sentence)


@pytest.mark.parametrize(("fields", "sentence"), MESSAGES)
def test_messages_that_are_wrong_are_refused(plain, fields, sentence):
    check_refusal(plain.post(ASKS["chat/completions"] | fields, "chat/completions"), sentence)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["e3", "kl", "{}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(sorted(COMPLETION | CHAT)) | st.text(max_size=8)


@given(st.sampled_from(["completions", "chat/completions"]), st.dictionaries(NAMES, VALUES, max_size=3), st.booleans())
@settings(derandomize=True, max_examples=150, deadline=None)
def test_no_body_makes_the_server_fail(plain, endpoint, fields, inside):
    start = {"prompt": "e3 r1"} if endpoint == "completions" else {"messages": [{"role": "user", "content": "e3"}]}
    if inside:
        fields = {"generation_config": json.dumps(fields)}
    response = plain.post(start | {"max_tokens": 1} | fields, endpoint)
    if response.status_code != 200:
        assert response.status_code in (400, 404)
        check_refusal(response, status=response.status_code)


@given(st.dictionaries(st.sampled_from(sorted(GENERATION)), VALUES, max_size=3))
@settings(derandomize=True, max_examples=50, deadline=None)
def test_no_generation_config_makes_the_server_fail(plain, config):
    response = plain.post({"prompt": "e3 r1", "generation_config": json.dumps(config), "max_tokens": 1})
    if response.status_code != 200:
        check_refusal(response)


SAMPLING = {
    "temperature": st.sampled_from([0, 1e-4, 0.5, 2]),
    "top_p": st.sampled_from([0, 1e-9, 0.5, 1]),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.sampled_from(["e", [" ", "r1"], []]),
    "max_tokens": st.integers(1, 3),
    "num_loops": st.integers(1, 5),
}
CONFIG = {
    "halting": st.sampled_from(["fixed", {"rule": "kl", "kl_threshold": 1e9}, {"rule": "latent", "threshold": 2**62}]),
    "do_sample": st.booleans(),
    "temperature": st.sampled_from([1e-4, 1, 2.0]),
    "top_k": st.sampled_from([0, 1, 10**6, 2**31 - 1]),
    "top_p": st.floats(0, 1),
    "min_p": st.floats(0, 1),
    "typical_p": st.floats(1e-4, 1),
    "repetition_penalty": st.sampled_from([1e-4, 1, 1e4]),
    "no_repeat_ngram_size": st.sampled_from([0, 1, 2, 1000]),
    "min_new_tokens": st.sampled_from([0, 1, 1024]),
    "eos_token_id": st.integers(0, 26) | st.lists(st.integers(0, 26), min_size=1, max_size=30),
    "pad_token_id": st.integers(0, 26),
}  # fmt: skip


@given(st.fixed_dictionaries({}, optional=SAMPLING), st.none() | st.fixed_dictionaries({}, optional=CONFIG))
@settings(derandomize=True, max_examples=80, deadline=None)
def test_every_value_that_the_rules_let_through_is_answered(plain, fields, config):
    if config is not None:
        fields = fields | {"generation_config": json.dumps(config)}
    answer = plain.ask(**{"max_tokens": 3} | fields)
    assert 1 <= answer["usage"]["completion_tokens"] <= 3
    assert set(GENERATION) == {*CONFIG, "num_loops", "max_new_tokens", "bos_token_id"}


def test_a_model_that_is_not_here_is_not_looked_for(plain, tmp_path):
    make("per_loop").save_pretrained(tmp_path)
    for name in (str(tmp_path), "user/name", "../toy", ""):
        check_refusal(plain.post({"prompt": QUESTION, "model": name}), "there is no model", status=404)
    assert plain.text(model="toy") == plain.text()


def test_other_paths_and_content_are_refused(plain):
    check_refusal(plain.post({}, "embeddings"), "there is /health", status=404)
    check_refusal(plain.http.get("/v1/completions"), "Method Not Allowed", status=405)
    check_refusal(plain.post({"prompt": QUESTION}, content_type="text/plain"), "application/json", status=415)
    assert plain.http.get("/health").json() == {"status": "ok"}


def test_what_a_model_cannot_do_is_refused():
    tokenizer = hop_tokenizer(num_entities=20, num_relations=4)
    with served(make("learned"), tokenizer) as client:
        messages = {"messages": [{"role": "user", "content": QUESTION}]}
        check_refusal(client.post(messages, "chat/completions"), "has no chat template")
        check_refusal(client.post({"prompt": [3] * 65}), "65 tokens, more than 64, the positions")
        check_refusal(client.post({"prompt": [3] * 60, "max_tokens": 6}), "room for 5 more in the 64 positions")
        for asked in ({"max_tokens": 5}, {}):
            answer = client.post({"prompt": [3] * 60} | asked).json()
            assert answer["usage"]["completion_tokens"] == 5
    with served(make("frozen")) as client:
        check_refusal(client.post({"prompt": QUESTION, "halting": "kl"}), "has no halting rules")
    with served(make("streams"), max_loops=70) as client:
        check_refusal(client.post({"prompt": QUESTION, "num_loops": 65}), "from 1 to 64")


def test_a_template_that_refuses_is_quoted():
    tokenizer = hop_tokenizer(num_entities=20, num_relations=4)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate: ' + messages[0]['content']) }}"
    with served(make("per_loop"), tokenizer) as client:
        body = {"messages": [{"role": "user", "content": "e3"}]}
        check_refusal(client.post(body, "chat/completions"), "roles must alternate: e3")


# ---- limits


def test_a_long_body_is_refused_before_it_is_read():
    with served(make("per_loop"), max_body_bytes=1000) as client:
        check_refusal(client.post(b" " * 1001), "longer than 1000 bytes", status=413)
        assert client.post(b'{"prompt": "e3 r1", "max_tokens": 1}'.ljust(1000)).status_code == 200
        pieces = (b" " * 500 for _ in range(3))  # of unknown length
        headers = {"content-type": "application/json"}
        response = client.http.post("/v1/completions", content=pieces, headers=headers)
        check_refusal(response, "longer than 1000 bytes", status=413)
        request = urllib.request.Request(f"{client.http.base_url.join('/v1/completions')}", b" " * 2**22, headers)
        with pytest.raises(urllib.error.HTTPError, match="413"):  # it reads no answer before it has sent all
            urllib.request.urlopen(request)
        with socket.create_connection(client.address) as raw:  # that never sends what it announces
            raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            raw.sendall(b"Content-Length: 100000000000\r\n\r\n{")
            assert raw.recv(100).startswith(b"HTTP/1.1 413")


def test_limits_are_options_that_bound_requests():
    assert set(LIMITS) == {field.name for field in fields(Limits)}
    with served(make("per_loop"), max_loops=5, max_new_tokens=6, max_prompt_tokens=7, max_seconds=1) as client:
        check_refusal(
            client.post({"prompt": QUESTION, "num_loops": 6}), "from 1 to 5 (the server's limit, --max-loops)"
        )
        check_refusal(client.post({"prompt": QUESTION, "max_tokens": 7}), "--max-new-tokens")
        check_refusal(
            client.post({"prompt": [3] * 8}), "8 tokens, more than 7, the server's limit (--max-prompt-tokens)"
        )
        assert client.ask(prompt=[3] * 7, num_loops=5, max_tokens=None)["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_ends_with_its_seconds(stream):
    with served(make("per_loop"), max_seconds=1) as client:
        response = client.post({"prompt": QUESTION, "stream": stream} | GREEDY)
        if stream:
            *_, last = [line for line in response.text.splitlines() if line]
            assert "not finished after 1 seconds" in json.loads(last.removeprefix("data: "))["error"]["message"]
        else:
            check_refusal(response, "not finished after 1 seconds", status=503)
        client.wait(lambda: not client.service.jobs)


def test_more_requests_than_the_limit_are_told_to_come_back():
    with served(make("per_loop"), max_requests=2) as client, client.busy(), client.busy():
        check_refusal(client.post({"prompt": QUESTION}), "2 requests are at work", status=503)
        assert client.http.get("/health").status_code == 200


def test_caches_fit_in_their_limit_or_wait():
    """Bytes of a token: keys and values of 2 heads of 8 floats in 2 layers, of every loop; a page has 32 tokens."""
    model = make("per_loop")
    most = 32 * 8 * (2 * 2 * 8 * 4 * 2)
    reserved = []
    with served(model, max_cache_bytes=most) as client:
        model.lm_head.register_forward_hook(
            lambda *_: reserved.append(sum(job.cache_bytes for job in list(client.service.jobs)))
        )
        body = {"prompt": [3, 4], "max_tokens": 8}
        check_refusal(
            client.post(body | {"num_loops": 9}), f"more than {most:,}, the server's limit (--max-cache-bytes)"
        )
        with concurrent.futures.ThreadPoolExecutor(6) as clients:
            answers = list(clients.map(lambda loops: client.post(body | {"num_loops": loops}), [8, 3, 8, 2, 5, 8]))
        assert [answer.status_code for answer in answers] == [200] * 6
        assert max(reserved) == most  # the largest fill it, the small ones share it
        assert len(set(reserved)) > 1
        assert [answer.json()["usage"]["loops"] for answer in answers] == [8 * loops for loops in (8, 3, 8, 2, 5, 8)]


# ---- turns


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_turns_go_round(threads):
    turns, log = Turns(), []

    def work(name: int) -> None:
        turns.take()
        for _ in range(20):
            log.append(name)
            turns.pass_on()
        turns.give()

    workers = [threading.Thread(target=work, args=(name,)) for name in range(threads)]
    turns.take()
    for worker in workers:
        worker.start()
    Client.wait(lambda: len(turns.waiting) == threads)
    turns.give()
    for worker in workers:
        worker.join()
    assert log == log[:threads] * 20
    assert set(log) == set(range(threads))


def note_turns(layer, log: list) -> None:
    """Let `log` grow by the job at work after every pass over `layer`, as the service's own hook sees it."""
    layer.register_forward_hook(lambda *_: log.append(at_work.job), prepend=True)


def test_every_step_runs_one_loop_of_every_request_at_work():
    """However greedy some are: a token of theirs is 64 loops, in none of which another waits."""
    model, steps = make("per_loop"), []
    with served(model) as client, client.busy(), client.busy():
        batch = client.service.worker.batch
        model.model.core[-1].register_forward_hook(lambda *_: steps.append([row.request for row in batch.looping]))
        usages = [client.ask(num_loops=loops)["usage"] for loops in (1, 7, 16)]
        assert len(client.service.jobs) == 2
    counts = collections.Counter(itertools.chain(*steps))
    asked = [request for request in counts if request.num_loops < 64]
    assert [counts[request] for request in asked] == [usage["loops"] for usage in usages] == [5, 35, 80]
    for request in asked:
        places = [place for place, each in enumerate(steps) if request in each]
        assert places[-1] - places[0] + 1 == len(places)
        assert {len(steps[place]) for place in places} == {3}


def test_requests_above_the_rows_wait_for_one():
    model, most = make("per_loop"), []
    with served(model, max_rows=2) as client, concurrent.futures.ThreadPoolExecutor(8) as clients:
        batch = client.service.worker.batch
        model.model.core[-1].register_forward_hook(lambda *_: most.append(len(batch.looping)))
        answers = list(clients.map(lambda loops: client.text(num_loops=loops), range(1, 9)))
    assert answers == [generated(make("per_loop"), num_loops=loops) for loops in range(1, 9)]
    assert max(most) == 2


def test_a_model_that_fails_fails_the_requests_at_work_and_serves_the_next():
    model = make("per_loop")
    with served(model) as client:
        hook = model.model.core[-1].register_forward_hook(lambda *_: 1 / 0)
        check_refusal(client.post(ASKS["completions"]), "the server failed at this request", status=500)
        hook.remove()
        assert client.text(num_loops=3) == generated(make("per_loop"), num_loops=3)


def test_between_two_tokens_of_a_frozen_model_every_other_request_has_one_at_most():
    model, log = make("frozen"), []
    with served(model) as client, client.busy(), client.busy() as greedy:
        note_turns(model.lm_head, log)
        for loops in (1, 4):
            client.ask(num_loops=loops)
        assert greedy in client.service.jobs
    check_fair(log)
    assert len(set(log)) == 4


def check_fair(log: list) -> None:
    for job in set(log):
        places = [place for place, each in enumerate(log) if each is job]
        for start, end in itertools.pairwise(places):
            between = log[start + 1 : end]
            assert len(between) == len(set(between))
    changes = sum(first is not second for first, second in itertools.pairwise(log))
    assert changes > len(log) // 2  # they did work at the same time


@pytest.mark.parametrize("kind", ["per_loop", "frozen"])
@pytest.mark.parametrize("stream", [False, True])
def test_work_stops_within_a_loop_when_the_client_leaves(kind, stream):
    with served(make(kind)) as client:
        body = json.dumps({"prompt": QUESTION, "stream": stream} | GREEDY).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        with socket.create_connection(client.address) as raw:
            raw.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            client.wait(lambda: client.service.jobs)
            [job] = client.service.jobs
            client.wait(lambda: job.loops > 64)
        client.wait(lambda: job.left)
        at_leaving = job.loops
        client.wait(lambda: not client.service.jobs)
        assert job.loops <= at_leaving + 2
        assert client.text(num_loops=3) == generated(make(kind), num_loops=3)


def test_a_client_that_leaves_while_it_waits_is_forgotten():
    with served(make("per_loop"), max_cache_bytes=2**25) as client, client.busy(max_tokens=1000):
        with pytest.raises(httpx2.TimeoutException):
            client.http.post("/v1/completions", json={"prompt": QUESTION} | GREEDY, timeout=0.3)
        client.wait(lambda: len(client.service.jobs) == 1)


# ---- the command


def save_chat_model(folder):
    model = make("per_loop")
    for saved in (model, TOKENIZER):
        saved.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--continuous-batching"], "unknown argument '--continuous-batching'"),
        (["--max-lops", "3"], "did you mean --max-loops"),
        (["--max-loops", "0"], "--max-loops: must be an integer from 1"),
        (["--grace-seconds", "-1"], "--grace-seconds: must be an integer from 0"),
        (["--port", "70000"], "--port: must be an integer from 0 to 65535"),
        (["--host", "no such host"], "cannot listen at no such host"),
        (["--device", "nowhere"], "nowhere"),
        (["--max-loops", "4"], "num_loops must be an integer from 1 to 4 (the server's limit, --max-loops), got 5"),
    ],
)
def test_options_that_are_wrong_are_refused(tmp_path, capsys, arguments, sentence):
    save_chat_model(tmp_path)
    try:
        status = main(["serve", str(tmp_path), "--port", "0", *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert sentence in capsys.readouterr().err


def test_a_taken_port_is_refused(tmp_path, capsys):
    save_chat_model(tmp_path)
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        assert main(["serve", str(tmp_path), "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen at 127.0.0.1" in capsys.readouterr().err


def changed(folder, file: str, **fields) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: changed(folder, "config.json", architectures=["LlamaForCausalLM"]), "is a model of ['Llama"),
        (lambda folder: changed(folder, "config.json", architectures=3), "is a model of 3"),
        (lambda folder: changed(folder, "config.json", num_core_layers=3), "do not fit"),
        (lambda folder: changed(folder, "generation_config.json", num_beams=4), "unknown field 'num_beams'"),
        (lambda folder: changed(folder, "generation_config.json", num_loops=100), "num_loops must be"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "cannot be loaded"),
    ],
)
def test_a_folder_that_cannot_be_served_is_refused(tmp_path, capsys, change, sentence):
    save_chat_model(tmp_path)
    change(tmp_path)
    assert main(["serve", str(tmp_path), "--port", "0"]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["per_loop", "frozen"])
def test_a_saved_model_is_served_without_running_the_code_in_its_folder(tmp_path, kind):
    model = make(kind)
    if kind == "frozen":
        model.loop.detach().save_pretrained(tmp_path / "base")
        model = attach(type(model).from_pretrained(tmp_path / "base"), window=(1, 2), num_loops=5)
    for saved in (model, TOKENIZER):
        saved.save_pretrained(tmp_path / "model")
    code = [path for path in (tmp_path / "model").iterdir() if path.suffix == ".py"]
    for path in code:
        path.write_text("raise SystemExit('the code in the folder ran')")
    assert code
    folder = str(tmp_path / "model")
    check_kind(folder)
    with served(*load_model(folder, "")) as client:
        assert client.text(num_loops=3) == generated(model, num_loops=3)
        assert client.text() == generated(model, num_loops=5)


RULE = {"rule": "kl", "kl_threshold": 1e9}


@pytest.mark.parametrize("rule", [None, RULE])
def test_true_is_the_calibrated_rule_of_the_model(rule):
    model = make("per_loop")
    if rule is not None:
        model.generation_config.calibrated_halting = rule
    given = json.dumps({"num_loops": 8, "calibrated_halting": RULE})  # what a client read of a model is let be
    with served(model) as client:
        plainly = generated(make("per_loop"), num_loops=8)
        assert client.text(num_loops=8) == client.text(generation_config=given) == plainly
        in_config = json.dumps({"halting": True, "num_loops": 8})
        for body in ({"halting": True, "num_loops": 8}, {"generation_config": in_config}):
            if rule is None:
                check_refusal(client.post({"prompt": QUESTION, "max_tokens": 5} | body), "looped halting RUN --save")
            else:
                assert client.text(**body) == generated(make("per_loop"), num_loops=8, halting=rule)
    if rule is not None:
        assert generated(make("per_loop"), num_loops=8) != generated(make("per_loop"), num_loops=8, halting=rule)


@pytest.mark.parametrize("field", [{"draft_loops": 2, "num_assistant_tokens": 4}, {"max_length": 30}])
def test_what_changes_no_text_in_a_saved_generation_config_is_let_be(field):
    model = make("per_loop")
    model.generation_config.update(**field)
    with served(model) as client:
        assert client.text() == generated(make("per_loop"), num_loops=5)


class Process:
    """`looped serve` in a process of its own."""

    def __init__(self, model, home, *options: str):
        command = [
            sys.executable,
            "-m",
            "looplab.cli",
            "serve",
            str(model),
            "--port",
            "0",
            "--device",
            "cpu",
            *options,
        ]
        self.log = home / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"},
            )

    def __enter__(self) -> httpx2.Client:
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            if "is served at " in self.log.read_text():
                break
            time.sleep(0.1)
        self.address = self.log.read_text().partition("is served at ")[2].partition(";")[0]
        self.client = httpx2.Client(base_url=self.address, timeout=60)
        return self.client

    def __exit__(self, *exception):
        self.client.close()
        self.process.kill()
        self.process.wait()


def test_a_busy_server_ends_within_its_grace_period(tmp_path):
    model = save_chat_model(tmp_path / "model")
    greedy = {"prompt": QUESTION, "stream": True} | GREEDY
    process = Process(tmp_path / "model", tmp_path, "--grace-seconds", "1")
    with process as client:
        body = {"model": str(tmp_path / "model"), "prompt": QUESTION, "max_tokens": 5}
        answer = client.post("/v1/completions", json=body)
        assert answer.json()["choices"][0]["text"] == generated(model, num_loops=5)
        with (
            concurrent.futures.ThreadPoolExecutor() as clients,
            client.stream("POST", "/v1/completions", json=greedy) as busy,
        ):
            lines = busy.iter_lines()
            next(lines)
            whole = clients.submit(client.post, "/v1/completions", json=greedy | {"stream": False})
            time.sleep(0.5)
            process.process.send_signal(signal.SIGTERM)
            check_refusal(whole.result(), "shutting down", status=503)
            *_, last = [line for line in lines if line]
            assert "shutting down" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert process.process.wait(timeout=30) == 0
        with pytest.raises(httpx2.ConnectError):
            client.get("/health")
        assert "Traceback" not in process.log.read_text()


def test_the_second_signal_ends_it_at_once(tmp_path):
    save_chat_model(tmp_path / "model")
    process = Process(tmp_path / "model", tmp_path, "--grace-seconds", "600")
    with (
        process as client,
        client.stream("POST", "/v1/completions", json={"prompt": QUESTION, "stream": True} | GREEDY) as it,
    ):
        lines = it.iter_lines()
        next(lines)
        process.process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.process.poll() is None
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(timeout=30) == 128 + signal.SIGTERM
