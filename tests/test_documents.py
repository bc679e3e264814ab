"""Every command line of the documents is one that its program accepts, up to reading its config."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "launch/README.md", *sorted((ROOT / "configs").glob("*.py"))]

# In a process of its own for each line, forked where the imports are done: flags can be declared only once.
PARSE = """
import json, os, runpy, sys
import d2f_jax
from d2f_jax import datasets, pipeline, program, settings

def parse(main):
    rest = program._parse(sys.argv)
    given = program.flags.FLAGS
    if "config" in given:
        settings.check_values(given.config)

program.run = parse
for module, arguments in json.load(sys.stdin):
    sys.argv = [module, *arguments]
    if not (child := os.fork()):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, flush=True)
"""


def commands(document: Path) -> list[str]:
    """Lines with --config=, or that start one of our programs, joined where they are continued."""
    text = document.read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if re.search(r"-m d2f_jax\.\w+ --|[ \"]--config=\S", line)]
    return [" ".join(line.split()) for line in lines if "`" not in line]


def split(line: str) -> tuple[str, list[str]]:
    """The program of a line, and its arguments as a shell hands them over."""
    words = shlex.split(line, comments=True)
    modules = [word.removeprefix("--module=") for word in words if word.startswith(("--module=", "d2f_jax."))]
    start = words.index("--") if "--" in words else words.index("-m") + 1 if "-m" in words else None
    if start is None:  # what a script hands on
        start = next(i for i, word in enumerate(words) if word.startswith("--config")) - 1
    return modules[0] if modules else "d2f_jax.train", words[start + 1 :]


FOUND = [(document, line) for document in DOCUMENTS for line in commands(document)]


def test_programs_take_the_lines_of_the_documents() -> None:
    lines = [split(line) for _, line in FOUND]
    assert len(lines) > 25 and {"d2f_jax.train", "d2f_jax.evaluate", "d2f_jax.reflow"} <= {
        module for module, _ in lines
    }
    result = subprocess.run(
        [sys.executable, "-c", PARSE],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        timeout=300,
    )
    codes = [int(code) for code in result.stdout.split()]
    refused = [line for (_, line), code in zip(FOUND, codes, strict=True) if code]
    assert not refused, result.stderr


@pytest.mark.parametrize(("document", "line"), FOUND)
def test_a_shell_takes_nothing_of_a_line_apart(document: Path, line: str) -> None:
    bare = re.sub(r"\"[^\"]*\"|'[^']*'| #.*", "", line)
    assert not re.search(r"[{}?&*;<>]", bare), (
        f"{document.relative_to(ROOT)}: quote what the shell would take apart in {line}"
    )
