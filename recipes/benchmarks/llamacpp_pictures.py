"""What llama.cpp computes with the GGUF files of a model that sees: its answers to prompts with pictures.

    build/llamacpp/bin/python recipes/benchmarks/llamacpp_pictures.py MODEL.gguf MMPROJ.gguf REQUEST.json ANSWER.npz

Runs in an environment of its own (`make llamacpp`), knows nothing of edgerazor and computes on the CPU, with the
libraries that were built there. The request is a JSON object:

    prompts     list of texts in the form of the model's chats, each with a mark (`<__media__>`) where a picture stands
    pictures    list of the files of these pictures
    answers     lists of token ids, as long as one another, that continue the prompts
    cache_bits  16 or 32: of each number in the cache of keys and values
    threads     to compute with

The answer holds `logits` float32 [prompts, tokens of an answer, vocabulary], by which each token of an answer would be
chosen, and `tokens` int32 [prompts]: how many tokens a prompt takes, those of its picture included.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

TOOLS = str(Path(__file__).resolve().parents[2] / "build" / "llamacpp" / "tools")
os.environ.setdefault("LLAMA_CPP_LIB_PATH", TOOLS)
os.environ.setdefault("MTMD_CPP_LIB", TOOLS)

import llama_cpp  # noqa: E402
from llama_cpp import mtmd_cpp as mtmd  # noqa: E402

CACHE_TYPES = {16: llama_cpp.GGML_TYPE_F16, 32: llama_cpp.GGML_TYPE_F32}
BATCH = 512


class Seeing:
    """A model and its tower.

    Args:
        file: of the decoder.
        tower: the other file.
        cache_bits: of keys and values.
        threads: that compute.
    """

    def __init__(self, file: Path, tower: Path, cache_bits: int, threads: int) -> None:
        self.model = llama_cpp.Llama(
            str(file),
            n_ctx=4 * BATCH,
            n_batch=BATCH,
            n_ubatch=BATCH,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=True,
            type_k=CACHE_TYPES[cache_bits],
            type_v=CACHE_TYPES[cache_bits],
            verbose=False,
        )
        settings = mtmd.mtmd_context_params_default()
        settings.use_gpu, settings.n_threads, settings.warmup = False, threads, False
        self.tower = mtmd.mtmd_init_from_file(str(tower).encode(), self.model.model, settings)
        if not self.tower:
            raise SystemExit(f"llama.cpp does not read {tower}")

    def logits(self, prompt: str, picture: Path, answer: list[int]) -> tuple[np.ndarray, int]:
        """Logits float32 [tokens of the answer, vocabulary] before each token of an answer, and the prompt's length."""
        context = self.model._ctx.ctx
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        length, width = self._read(context, prompt, picture), self.model.n_vocab()
        rows = []
        batch = llama_cpp.llama_batch_init(1, 0, 1)
        for place, token in enumerate(answer, length):
            row = llama_cpp.llama_get_logits_ith(context, -1)
            rows.append(np.ctypeslib.as_array(row, (width,)).copy())
            batch.n_tokens, batch.token[0], batch.pos[0] = 1, token, place
            batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, 0, True
            if llama_cpp.llama_decode(context, batch):
                raise SystemExit("llama.cpp cannot decode")
        llama_cpp.llama_batch_free(batch)
        return np.stack(rows), length

    def _read(self, context: Any, prompt: str, picture: Path) -> int:
        """Compute a prompt; how many positions it takes."""
        data = picture.read_bytes()
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        bitmap = mtmd.mtmd_helper_bitmap_init_from_buf(self.tower, buffer, len(data), False)
        chunks = mtmd.mtmd_input_chunks_init()
        text = mtmd.mtmd_input_text(prompt.encode(), len(prompt.encode()), False, True)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if mtmd.mtmd_tokenize(self.tower, chunks, ctypes.byref(text), bitmaps, 1):
            raise SystemExit("llama.cpp cannot cut the prompt into tokens")
        end = llama_cpp.llama_pos(0)
        given = self.tower, context, chunks, llama_cpp.llama_pos(0), llama_cpp.llama_seq_id(0)
        if mtmd.mtmd_helper_eval_chunks(*given, BATCH, True, ctypes.byref(end)):
            raise SystemExit("llama.cpp cannot compute the prompt")
        mtmd.mtmd_input_chunks_free(chunks)
        mtmd.mtmd_bitmap_free(bitmap)
        return int(end.value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("file", "tower", "request", "answer"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    request = json.loads(options.request.read_text(encoding="utf-8"))
    seeing = Seeing(options.file, options.tower, request["cache_bits"], request["threads"])
    requests = zip(request["prompts"], request["pictures"], request["answers"], strict=True)
    answers = [seeing.logits(prompt, Path(picture), answer) for prompt, picture, answer in requests]
    logits, lengths = zip(*answers, strict=True)
    np.savez(options.answer, logits=np.stack(logits), tokens=np.array(lengths, np.int32))


if __name__ == "__main__":
    main()
