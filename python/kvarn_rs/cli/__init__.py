"""The `kvarn` command: `generate`, `calibrate`, `inspect`, `plan`, `doctor`, `bench`.

Exit codes: 0 success; 1 a check of the command failed (`doctor`, `bench`), or the result could not be written; 2
invalid input, with one line on stderr; 130 interrupted; 141 the reader of stdout closed it. Each command is one module
with `add_parser` and `run`; its docstring documents its JSON output.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import ConfigError, KvarnError
from . import bench, calibrate, doctor, generate, inspect, plan
from .console import Console

__all__ = ["main"]


class _Parser(argparse.ArgumentParser):
    """An argument parser that raises its errors, so that they are reported in one line like every other error.

    Options cannot be abbreviated: `--prompt` would mean `--prompt-file`, and a new option could change the meaning.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see `{self.prog} --help`)")


def _version() -> str:
    from .. import __version__

    return __version__


class _ShowVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"kvarn {_version()}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(prog="kvarn", description="A quantized, paged key/value cache for language models.")
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="print the version")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in (generate, calibrate, inspect, plan, doctor, bench):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: `sys.argv`) and returns its exit code."""
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - open as long as the process
    parser = build_parser()
    try:
        arguments = parser.parse_args(argv)
        if "run" not in arguments:
            parser.print_help()
            return 0
        code = arguments.run(arguments, Console(json=arguments.json, quiet=arguments.quiet))
        sys.stdout.flush()  # while BrokenPipeError is still caught
        return code
    except KvarnError as error:
        print(f"kvarn: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kvarn: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # such as piped to `head`; the flush at exit must not raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # such as no space left for stdout
        print(f"kvarn: error: {error.strerror or error}", file=sys.stderr)
        if sys.stdout is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
