"""What tests of the server share: a tokenizer that needs no training, and a server in a thread."""

import socket
import threading
import time
from contextlib import contextmanager

import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dsla_hf.serving.command import DrainingServer

CHAT = "{% for m in messages %}{{ raise_exception('no such role') if m.role == 'bad' }}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def byte_tokenizer(size=97):
    """Every token is a byte or two; of a vocabulary of `size`, so that random models speak it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_first = [char for char in alphabet if char.isascii()][: size - 3]
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *bytes_first])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT
    return tokenizer


def served(app, drain_seconds=5.0):
    """The app on a free port of this machine: yields the server and its address."""
    return running_server(lambda config: DrainingServer(config, app.state.engine, drain_seconds), app)


@contextmanager
def running_server(make, app, **options):
    """A server of uvicorn, `make(config)`, in a thread: yields it and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = make(uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=5, **options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive(), "the server does not start"
        time.sleep(0.01)
    try:
        yield server, f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
