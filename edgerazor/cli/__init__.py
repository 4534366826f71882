"""The command line: `app` the commands, `options` the table they are made of, `errors` what becomes of exceptions."""

from edgerazor.cli.app import main

__all__ = ["main"]
