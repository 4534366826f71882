"""The entry point: prepares the process, runs the command line, and ends without a traceback after Ctrl-C."""

from __future__ import annotations

from edgerazor import terminal


def main() -> None:
    """Run the command line; ends the process."""
    try:
        terminal.prepare()
        from edgerazor.cli import main as command_line  # takes a while, in which Ctrl-C may be pressed

        command_line()
    except KeyboardInterrupt:
        terminal.end_interrupted()
    finally:
        terminal.leave()


if __name__ == "__main__":
    main()
