"""The one error meant for people: what is wrong, what was expected, what to run next."""

from __future__ import annotations

#: Exit codes of the command line.
DONE, FAILED, USAGE, QUALITY, INTERRUPTED = 0, 1, 2, 3, 130

#: Most threads of any setting: more than the cores of any machine, and few enough to be created on all of them.
MOST_THREADS = 1024


class UserError(Exception):
    """A failure the user can act on, printed as one sentence and never as a traceback.

    Args:
        message: what is wrong and what was expected, in one sentence.
        hint: what to run or change next; printed on a line of its own.
        code: exit code; `FAILED` when something went wrong, `USAGE` when the command or its input is wrong,
            `QUALITY` when the result misses a quality gate.
    """

    def __init__(self, message: str, hint: str = "", code: int = FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code


def usage_error(message: str, hint: str = "") -> UserError:
    """A `UserError` for a wrong command or recipe (exit code 2)."""
    return UserError(message, hint, USAGE)


def plain(text: object, most: int = 400) -> str:
    """Text of a file or a stranger as part of a sentence: cut, and without control characters or new lines."""
    words = str(text)
    return _printable(words if len(words) <= most else f"{words[:most]}...")


def harmless(text: str, most: int | None = None) -> str:
    """Lines for a terminal in which no character but the new line commands it, hides, or turns the writing around.

    Args:
        text: words of ours, perhaps with those of a stranger in them.
        most: bytes in UTF-8 that may come of it; where it is cut, it says so.
    """
    if most is not None and len(text) > most // 4:
        raw = text[: most + 1].encode("utf-8", "replace")
        if len(raw) > most:
            text = raw[:most].decode("utf-8", "ignore").rstrip() + "..." + "\n" * text.endswith("\n")
    return "\n".join(map(_printable, text.split("\n")))


def _printable(words: str) -> str:
    return (
        words if words.isprintable() else "".join(character if character.isprintable() else "?" for character in words)
    )
