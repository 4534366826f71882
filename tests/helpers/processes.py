"""Commands in several processes, as a launcher starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgerazor.training import sharding
from helpers.tiny_job import Outcome

#: One command line after the other, each a Python list in a line of the file that the script is given.
COMMANDS = """
import ast, sys
from pathlib import Path
from edgerazor.cli import main
for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
    sys.argv = ["edgerazor", *ast.literal_eval(line)]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
"""


def launch(script: Path, processes: int, *words: Any, sharded: bool = False) -> Outcome:
    """A script in several processes, as torchrun starts them, or as `accelerate launch` does with FSDP2."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), str(script))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if sharded:
        environment |= {sharding.USE_FSDP: "true", sharding.FSDP_VERSION: "2"}
    done = subprocess.run(
        [sys.executable, *torchrun, *map(str, words)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def launch_commands(folder: Path, processes: int, *commands: tuple[Any, ...]) -> Outcome:
    """Some commands one after the other, all in the same processes."""
    script, file = folder / "commands.py", folder / "commands.txt"
    script.write_text(COMMANDS, encoding="utf-8")
    file.write_text("".join(f"{[str(word) for word in words]!r}\n" for words in commands), encoding="utf-8")
    return launch(script, processes, file)
