"""The OpenAI HTTP interface for a packed model, and the page to chat with it.

A request goes down in five steps: `guard` lets it in (host, origin, key, request id), `protocol` checks its fields,
`prompts` makes tokens of it, `engine` has a scheduler of the runtime write and turns what comes from its thread into
pieces of text, and `completions` or `chat` make OpenAI's JSON of those. `app` puts them together, `listening` is the
process around it: socket, signals, the end.
"""

from edgerazor.server.app import build_app
from edgerazor.server.engine import Engine
from edgerazor.server.listening import is_loopback, listen, run

__all__ = ["Engine", "build_app", "is_loopback", "listen", "run"]
