"""The command line as a whole: help, version, exit codes, and the parsing of numbers."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvarn_rs
from kvarn_rs.cli import main, plan
from kvarn_rs.cli.sizes import format_bytes, format_count, parse_bytes, parse_count, parse_names


def test_without_a_command_it_prints_its_help(kvarn: Callable[..., Any]) -> None:
    done = kvarn()
    assert done.code == 0
    assert all(command in done.out for command in ("generate", "plan", "doctor", "bench"))


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"kvarn {kvarn_rs.__version__}\n"


@pytest.mark.parametrize("command", ["generate", "plan", "doctor", "bench", "bench attend", "bench seal"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--help"])
    assert stopped.value.code == 0
    assert "usage: kvarn" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    ["nonsense", "plan", "plan x --memory", "plan x --memory much", "doctor --gpu", "bench", "bench fly", "--what"],
)
def test_an_invalid_command_line_is_refused_in_one_line(arguments: str, kvarn: Callable[..., Any]) -> None:
    kvarn(*arguments.split()).refused()


@pytest.mark.parametrize(
    "arguments",
    [
        "generate --prompt hello",
        "generate hello --comp",
        "plan x --memory 1GiB --weig 1GiB",
        "bench attend --form int8",
        "bench seal --threa 1",
        "calibrate x --tok 3",
        "inspect x --js",
        "doctor --js",
        "--vers",
    ],
)
def test_options_cannot_be_abbreviated(arguments: str, kvarn: Callable[..., Any]) -> None:
    assert "unrecognized" in kvarn(*arguments.split()).refused()


def test_an_interrupt_exits_with_130(kvarn: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "run", interrupted)
    assert kvarn("plan", "x", "--memory", "1GiB").code == 130


def test_the_module_runs_and_its_exit_code_is_the_commands() -> None:
    command = [sys.executable, "-m", "kvarn_rs.cli", "plan", "no/such/config.json", "--memory", "1GiB", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


def test_a_reader_that_closes_stdout_is_no_error(config_file: Callable[..., Path]) -> None:
    file = config_file(num_hidden_layers=2, num_attention_heads=2, hidden_size=64)
    command = [sys.executable, "-m", "kvarn_rs.cli", "plan", str(file), "--memory", "1GiB"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80GiB", 80 * 2**30),
        ("80 GB", 80 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("512MiB", 2**29),
        ("512m", 2**29),
        ("4096", 4096),
        ("4096B", 4096),
        ("2tb", 2 * 10**12),
    ],
)
def test_sizes_are_parsed_with_units(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(("text", "expected"), [("32k", 32768), ("32K", 32768), ("1m", 2**20), ("8192", 8192)])
def test_counts_are_parsed_with_units(text: str, expected: int) -> None:
    assert parse_count(text) == expected


@pytest.mark.parametrize("text", ["", "k", "-1", "1e9", "12 potatoes", "0x10", "99999999999999999999", "nan"])
def test_invalid_sizes_and_counts_are_refused(text: str) -> None:
    for parse in (parse_bytes, parse_count):
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)
    with pytest.raises(argparse.ArgumentTypeError):
        parse_count("0")
    with pytest.raises(argparse.ArgumentTypeError):
        parse_names(" , ")


def test_sizes_and_counts_are_formatted_short() -> None:
    assert [format_bytes(count) for count in (17, 1536, 3 * 2**29)] == ["17 B", "1.5 KiB", "1.5 GiB"]
    assert [format_count(count) for count in (500, 5000, 32768)] == ["500", "5,000", "32k"]
    assert parse_names("int8, bf16,int8") == ["int8", "bf16"]
