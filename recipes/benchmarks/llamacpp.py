"""What llama.cpp computes with a GGUF file: token ids of texts, logits of rows of tokens, greedy text.

    build/llamacpp/bin/python recipes/benchmarks/llamacpp.py MODEL.gguf REQUEST.json ANSWER.npz

Runs in an environment of its own (`make llamacpp`), knows nothing of edgerazor and computes on the CPU, with the
library that was built there. The request is a JSON object:

    texts       list of strings, to be cut into tokens; names of special tokens in them are those tokens
    rows        lists of token ids; each is a text of its own
    prompt      token ids, to be continued
    new_tokens  by how many
    cache_bits  16 or 32: of each number in the cache of keys and values
    threads     to compute with

The answer holds `ids` (JSON), `bos` (JSON: ids of an empty text with the special tokens that the model asks for),
`greedy` int32 [new_tokens], `logits` float32 [all tokens of all rows, vocabulary] and `about` (the library's words
about its build).
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

# beside the binding's environment lie the tools and the library that both use
os.environ.setdefault("LLAMA_CPP_LIB_PATH", str(Path(__file__).resolve().parents[2] / "build" / "llamacpp" / "tools"))

import llama_cpp

CACHE_TYPES = {16: llama_cpp.GGML_TYPE_F16, 32: llama_cpp.GGML_TYPE_F32}


def logits_of(model: Any, row: list[int]) -> np.ndarray:
    """Logits float32 [T, vocabulary] of a text of T tokens, computed at once."""
    model.reset()
    model.eval(row)
    return np.array(model.scores[: len(row)])


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The most probable continuation, token by token from the cache; the end of a text is a token like others."""
    written = [int(logits_of(model, prompt)[-1].argmax())]
    while len(written) < count:
        model.eval(written[-1:])
        written.append(int(model.scores[model.n_tokens - 1].argmax()))
    return written


def answer(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Everything that is asked of a file."""
    longest = max([len(request["prompt"]) + request["new_tokens"], *(len(row) for row in request["rows"])])
    threads = request["threads"]
    # a batch as long as the text, because the binding reads the logits of the last batch alone
    model = llama_cpp.Llama(
        str(path),
        n_ctx=longest,
        n_batch=longest,
        n_ubatch=longest,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        swa_full=True,
        type_k=CACHE_TYPES[request["cache_bits"]],
        type_v=CACHE_TYPES[request["cache_bits"]],
        verbose=False,
    )
    ids = [model.tokenize(text.encode(), add_bos=False, special=True) for text in request["texts"]]
    return {
        "ids": json.dumps(ids),
        "bos": json.dumps(model.tokenize(b"", add_bos=True)),
        "logits": np.concatenate([logits_of(model, row) for row in request["rows"]]),
        "greedy": np.array(greedy(model, request["prompt"], request["new_tokens"]), np.int32),
        "about": llama_cpp.llama_print_system_info().decode(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("request", type=Path)
    parser.add_argument("answer", type=Path)
    options = parser.parse_args()
    arrays = answer(options.model, json.loads(options.request.read_text(encoding="utf-8")))
    np.savez(options.answer, **arrays)


if __name__ == "__main__":
    main()
