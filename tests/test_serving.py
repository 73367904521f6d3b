"""`looped serve` answers as generate does, at the loops of the generation config."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from data_builders.tokenizers import hop_tokenizer
from looplab.cli import main
from toys import make_model

QUESTION = "e3 r1 r2"


def save_chat_model(folder):
    tokenizer = hop_tokenizer(num_entities=20, num_relations=4)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} <ans>{% endfor %}"
    model = make_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model.generation_config.num_loops = 5
    for saved in (model, tokenizer):
        saved.save_pretrained(folder)
    return model, tokenizer


def answer(model, tokenizer, num_loops, tokens=5):
    ids = tokenizer(QUESTION, return_tensors="pt").input_ids
    output = model.generate(ids, num_loops=num_loops, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


class Server:
    """A `looped serve` process on a free port of the loopback interface."""

    def __init__(self, model, home):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        port = self.address.rsplit(":", 1)[1]
        command = [sys.executable, "-m", "looplab.cli", "serve", str(model), "--host", "127.0.0.1", "--port", port]
        self.log = home / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--device", "cpu"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"},
            )
        self.model = str(model)

    def __enter__(self):
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"{self.address}/health").close()
                return self
            except urllib.error.URLError:
                time.sleep(0.1)
        raise TimeoutError(self.log.read_text()[-3000:])

    def __exit__(self, *exception):
        self.process.terminate()
        self.process.wait(timeout=30)

    def ask(self, endpoint, **fields) -> str:
        """The body of the answer to a greedy request of five tokens."""
        body = {"model": self.model, "max_tokens": 5, "temperature": 0, **fields}
        request = urllib.request.Request(
            f"{self.address}/v1/{endpoint}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            return response.read().decode()


@pytest.mark.slow
def test_the_server_answers_as_generate_does(tmp_path):
    model, tokenizer = save_chat_model(tmp_path / "model")
    expected = {loops: answer(model, tokenizer, loops) for loops in (3, 5, 8)}
    assert len(set(expected.values())) == 3
    chat = {"messages": [{"role": "user", "content": QUESTION}]}
    with Server(tmp_path / "model", tmp_path) as server:
        text = json.loads(server.ask("completions", prompt=QUESTION))["choices"][0]["text"]
        assert text == expected[5]
        whole = json.loads(server.ask("chat/completions", **chat))
        assert whole["choices"][0]["message"]["content"] == expected[5]

        lines = [line[6:] for line in server.ask("chat/completions", stream=True, **chat).splitlines() if line]
        deltas = [json.loads(line)["choices"][0]["delta"] for line in lines if line != "[DONE]"]
        assert len(deltas) > 5
        assert "".join(delta.get("content", "") for delta in deltas) == expected[5]

        other = json.dumps({"num_loops": 8, "pad_token_id": 0})
        text = json.loads(server.ask("completions", prompt=QUESTION, generation_config=other))["choices"][0]["text"]
        assert text == expected[8]
        with pytest.raises(urllib.error.HTTPError, match="422"):  # the API has no such field
            server.ask("completions", prompt=QUESTION, num_loops=8)


def test_a_folder_without_a_model_is_not_served(tmp_path, capsys):
    assert main(["serve", str(tmp_path)]) == 2
    assert "has no config.json" in capsys.readouterr().err
