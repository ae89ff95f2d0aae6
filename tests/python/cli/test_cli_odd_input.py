"""Extreme and malformed input to the command line: exit code 2 and one line on stderr."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def kvarn(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kvarn_rs.cli", *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, **options)


@pytest.mark.parametrize("what", ["nested", "endless", "long path"])
def test_an_invalid_configuration_is_refused(tmp_path: Path, what: str):
    file = tmp_path / "config.json"
    if what == "nested":
        file.write_text("[" * 100_000)
    path = {"nested": str(file), "endless": "/dev/zero", "long path": "x" * 5000}[what]
    if what == "endless" and not Path(path).exists():
        pytest.skip("no /dev/zero on this system")
    done = kvarn("plan", path, "--memory", "1GiB", stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr[-500:]


def test_a_prompt_that_is_not_utf8_is_refused():
    done = kvarn("generate", os.fsdecode(b"\xff\xfe"), stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "kvarn: error: the prompt is not UTF-8 text\n"


@pytest.mark.parametrize("options", [["--threads", "100000"], ["--context", "8t"], ["--batch", "100000000"]], ids=str)
def test_a_bench_beyond_any_memory_is_refused(options: list[str]):
    done = kvarn("bench", "attend", *options, stdout=subprocess.PIPE)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr[-500:]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_result_that_cannot_be_written_is_an_error_in_one_line():
    with open("/dev/full", "w") as full:
        done = kvarn("doctor", "--json", stdout=full)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr[-500:]
