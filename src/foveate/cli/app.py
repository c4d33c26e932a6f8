"""The program: its commands, and how it fails."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from foveate.cli import bench, calibrate, compare, convert, diff, harness, methods, models, papers, show, tune
from foveate.cli.options import with_ray_named
from foveate.cli.screen import say
from foveate.errors import FoveateError

app = typer.Typer(
    name="foveate",
    help="Efficient attention for language models: published methods behind one interface, compared with evidence.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    compare.compare,
    diff.diff,
    show.show,
    tune.tune,
    convert.convert,
    harness.harness,
    methods.methods,
    papers.papers,
    models.models,
):
    app.command()(command)
app.add_typer(bench.app)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(calibrate.calibrate)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and leave it: 0 when all went well, 2 after one line on stderr, 130 when it was interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    sys.exit(exit_code(lambda: app(args=with_ray_named(given), prog_name="foveate", standalone_mode=False)))


def exit_code(run: Callable[[], Any]) -> int:
    """What a program leaves with: the number that `run` gives, else 0; 130 where it was interrupted; 2 after one line
    on stderr about what a user can mend. A fault of the program is raised."""
    try:
        code = run()
        sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        say("stopped")
        return 130
    except BrokenPipeError:
        # The reader went away (`foveate papers | head`): nothing is left to say, and flushing at exit would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        reason = explain(error)
        if reason is None:
            raise
        say(reason)
        return 2
    return code if isinstance(code, int) else 0


def explain(error: Exception) -> str | None:
    """One line for what a user can mend; None for a fault of the program, which keeps its traceback."""
    if isinstance(error, FoveateError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"{where}no space left to write; free some and run the same command again"
        return f"{where}{error.strerror or error}"
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return "out of memory: ask for shorter --lengths, a smaller model, or another --device"
    usage = getattr(error, "format_message", None)  # typer's errors of usage, whichever copy of click it carries
    if usage is not None:
        context = getattr(error, "ctx", None)
        return f"{usage()} See: {context.command_path if context else 'foveate'} --help"
    return None
