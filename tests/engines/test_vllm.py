"""vLLM generates what `generate` does, at the depth that it was loaded with. `make test-engines` installs it.

It runs in an environment of its own, `.venv-vllm`, under the transformers that it pins: the models' code comes with
their weights.
"""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
import torch

from exports import rough_model, tokenizer_of
from served import GREEDY, SERVED
from toys import ROOT, make_ids

BIN = ROOT / ".venv-vllm" / "bin"
pytestmark = pytest.mark.skipif(not BIN.exists(), reason="vLLM is not installed here: make test-engines")

COMPILED = ("per_loop", "first", "prelude and coda", "first, prelude and coda")
PROMPTS = [make_ids(1, tokens, seed=tokens)[0].tolist() for tokens in (3, 11, 6)]
NEW_TOKENS = 8
STARTED = 600  # seconds until a server must answer


def settings(folder) -> dict[str, str]:
    """The environment variables of vLLM: one process, one thread, caches in `folder`."""
    return os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(folder / "vllm"),
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """Ask vLLM for the greedy tokens of a saved model; it is started once, since that takes a while."""
    folder = tmp_path_factory.mktemp("vllm")
    log = folder / "log.txt"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [BIN / "python", ROOT / "tests/engines/run_vllm.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=folder,
            env=settings(folder),
        )

    def ask(**case) -> dict:
        print(json.dumps(case), file=process.stdin, flush=True)
        line = process.stdout.readline()
        assert line, log.read_text()[-5000:]
        return json.loads(line)

    yield ask
    process.stdin.close()
    process.stdout.close()
    process.wait(60)


def make_served(folder, **fields):
    """A model that vLLM's kernels for CPUs can run, saved with its tokenizer: heads of 32 channels."""
    tokenizer = tokenizer_of("hops")
    model = rough_model(head_dim=32, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **fields)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def expected(model, num_loops: int | None) -> list[list[int]]:
    made = [
        model.generate(torch.tensor([prompt]), num_loops=num_loops, max_new_tokens=NEW_TOKENS, **GREEDY)
        for prompt in PROMPTS
    ]
    return [row[0, len(prompt) :].tolist() for row, prompt in zip(made, PROMPTS, strict=True)]


@pytest.mark.parametrize("num_loops", [None, 5])
@pytest.mark.parametrize(("shape", "eager"), [*((shape, True) for shape in SERVED), *((c, False) for c in COMPILED)])
def test_vllm_generates_what_generate_does(shape, eager, num_loops, vllm, tmp_path):
    model = make_served(tmp_path / "model", **SERVED[shape])
    case = {"prompts": PROMPTS, "new_tokens": NEW_TOKENS, "num_loops": num_loops, "eager": eager}
    assert vllm(folder=str(tmp_path / "model"), **case) == {"tokens": expected(model, num_loops)}


@pytest.mark.parametrize("kv_sharing", ["last", "mean", "gated", "natural"])
def test_a_policy_that_vllm_cannot_keep_is_refused_when_it_loads(kv_sharing, vllm, tmp_path):
    make_served(tmp_path / "model", kv_sharing=kv_sharing)
    found = vllm(folder=str(tmp_path / "model"), prompts=PROMPTS, new_tokens=1, num_loops=None, eager=True)
    assert "use generate, or kv_sharing='per_loop' or 'first'" in found["refused"]


def test_the_server_of_vllm_answers_at_the_depth_it_was_started_with(tmp_path):
    model = make_served(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not `vllm serve`, which asks for the version of a package "vllm": this one is vllm-cpu.
    command = [BIN / "python", "-m", "vllm.entrypoints.openai.api_server", "--model", tmp_path / "model"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--trust-remote-code", "--dtype", "float32", "--enforce-eager", "--max-model-len", "64"]
    command += ["--served-model-name", "toy", "--hf-overrides", json.dumps({"num_loops": 5})]
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, cwd=tmp_path, env=settings(tmp_path))
    try:
        await_health(f"http://127.0.0.1:{port}/health", server, log)
        asked = {"model": "toy", "prompt": PROMPTS[1], "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
    finally:
        server.terminate()
        server.wait(60)
    assert answer["usage"]["completion_tokens"] == NEW_TOKENS
    said = answer["choices"][0]["text"].split()
    assert said == tokenizer_of("hops").decode(expected(model, 5)[1], skip_special_tokens=True).split()


def await_health(address: str, server: subprocess.Popen, log) -> None:
    end = time.monotonic() + STARTED
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    raise AssertionError(log.read_text()[-5000:])
