"""`transformers serve` and `transformers chat` with a model that brings its own code along."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
import transformers

from .models import WINDOW, build
from .text import tiny_tokenizer

COMMAND = str(Path(sys.executable).with_name("transformers"))
HELLO = [{"role": "user", "content": "Hello, what is written there."}]
NEW = WINDOW + 2

pytestmark = pytest.mark.skipif(
    not hasattr(transformers, "AutoModelForDecision"),
    reason="`transformers serve` of this version finds no code that travels with a model",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    build("melodi", eos_token_id=2).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    code = str(tmp_path_factory.mktemp("code"))
    return {**os.environ, "HF_MODULES_CACHE": code, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.fixture(scope="module")
def server(folder, environment, tmp_path_factory):
    """Its address, from when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--trust-remote-code"]
    log = tmp_path_factory.mktemp("log") / "serve.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            [COMMAND, "serve", folder, *given], env=environment, stdout=out, stderr=out
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, process, log)
            yield address
        finally:
            process.terminate()
            process.wait(timeout=20)


def wait_for(address, process, log):
    for _ in range(480):
        try:
            urlopen(f"{address}/health", timeout=5).close()
            return
        except URLError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.25)
    raise TimeoutError(log.read_text())


def post(url, body):
    data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    with urlopen(Request(url, data, kind), timeout=60) as answer:
        return json.load(answer)


def answer_of_generate(text):
    tokenizer, model = tiny_tokenizer(), build("melodi", eos_token_id=2)
    ids = torch.tensor([tokenizer.encode(text)])
    new = model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True)


def test_chat_and_text_are_completed_as_by_generate(server, folder):
    given = {"model": folder, "max_tokens": NEW, "temperature": 0}
    chat = post(f"{server}/v1/chat/completions", {**given, "messages": HELLO})
    text = tiny_tokenizer().apply_chat_template(HELLO, tokenize=False)
    wanted = answer_of_generate(text)
    assert chat["choices"][0]["message"]["content"] == wanted
    assert chat["usage"]["completion_tokens"] == NEW
    completion = post(f"{server}/v1/completions", {**given, "prompt": "Once upon a time"})
    assert completion["choices"][0]["text"] == answer_of_generate("Once upon a time") != wanted


def test_chat_on_the_command_line(server, folder, environment):
    """It refuses to speak to any user while the Hub is offline, this machine included."""
    run = subprocess.run(
        [COMMAND, "chat", folder, f"{server}/v1", f"max_new_tokens={NEW}", "do_sample=False"],
        input="\n".join((HELLO[0]["content"], "no more of it", "!exit", "")),
        env={**environment, "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    text = tiny_tokenizer().apply_chat_template(HELLO, tokenize=False)
    assert answer_of_generate(text) in re.sub(r"\s", "", run.stdout)
