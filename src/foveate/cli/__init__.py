"""The command line: `foveate COMMAND`, one file per command."""

from foveate.cli.app import main

__all__ = ["main"]
