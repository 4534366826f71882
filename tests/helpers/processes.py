"""Commands in several processes, as a launcher starts them, without waiting for PyTorch in each of them.

A program imports what commands need, and is told by lines of JSON on its standard input what to do: it forks so many
processes, which get the environment that torchrun or `accelerate launch` would give them. Importing takes seconds of
a core, forking none. That real launchers start the same thing is for `test_accelerate_launches_it`.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgerazor.training import sharding
from helpers.places import ROOT
from helpers.tiny_job import Outcome

#: What forks. A process runs one command line after the other, until one ends with another code than 0.
SERVER = """
import json, os, signal, socket, sys, traceback
import torch
torch.set_num_threads(1)
import accelerate.utils, lm_eval.evaluator, torch.distributed.checkpoint, torch.distributed.fsdp, transformers
import edgerazor.pipeline, edgerazor.stages.record, edgerazor.tasks.lm_eval_models
from edgerazor.cli import main

def run(job, rank, port):
    os.environ.update(job["environment"], RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["processes"]),
        LOCAL_WORLD_SIZE=str(job["processes"]), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for number, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(f"{job['said']}/{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    exec(job["code"], {})
    for words in job["commands"]:
        sys.argv = ["edgerazor", *words]
        try:
            main()
        except SystemExit as ended:
            if ended.code:
                return ended.code
    return 0

signal.signal(signal.SIGINT, signal.default_int_handler)
for line in sys.stdin:
    job = json.loads(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(job["processes"]):
        child = os.fork()
        if not child:
            code = 70
            try:
                code = run(job, rank, port)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        children.append(child)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""
#: Seconds that several processes may take for what they are asked for.
LIMIT = 300


@functools.cache
def _server() -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    """End it with all that it has forked."""
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def launch(
    processes: int,
    *commands: tuple[Any, ...],
    sharded: bool = False,
    environment: Mapping[str, str] | None = None,
    code: str = "",
) -> list[Outcome]:
    """Commands one after the other, all in the same processes.

    Args:
        processes: how many.
        commands: the words of each.
        sharded: with the environment that `accelerate launch` gives for FSDP2.
        environment: more of it.
        code: Python that each process runs before the first of them.

    Returns:
        what each process left; of one that was killed, the code is the negative number of the signal.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    given = {sharding.USE_FSDP: "true", sharding.FSDP_VERSION: "2"} if sharded else {}
    given |= {name: value for name, value in os.environ.items() if name.startswith("EDGERAZOR_")}
    given |= environment or {}
    with tempfile.TemporaryDirectory() as said:
        job = {"processes": processes, "commands": [[str(word) for word in words] for words in commands]}
        server.stdin.write(json.dumps({**job, "environment": given, "code": code, "said": said}) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], LIMIT)[0]:
            _end(server)
            _server.cache_clear()
        codes = json.loads(server.stdout.readline() or "[]") or [-signal.SIGKILL] * processes
        texts = [[Path(said, f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(processes)]
    return [Outcome(code, *text) for code, text in zip(codes, texts, strict=True)]
