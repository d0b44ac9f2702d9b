"""The code blocks of a page of Markdown: which there are, what a page says of them, and how they are run or read.

A comment above a block is for the tests, and is visible in the page's source:

    <!-- test: `max_steps=100` becomes `max_steps=2` -->   the block runs with these parts replaced
    <!-- test: is read only, needs a GPU -->               the block is parsed, and its names are checked

All other blocks run as they stand, in their order, in a folder in which a clone's `checkpoints` and scripts lie.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

import command_line
import yaml


ROOT = Path(__file__).parents[2]
# What a clone has and a page may name; nothing of it is written to.
CLONED = ("benchmarks", "checkpoints", "conversion", "docs", "examples", "pipelines")
RUN, DATA, TEXT = ("python", "bash"), ("json", "yaml", "bibtex"), ("text",)

BLOCK = re.compile(
    r"(?:^ *<!-- test: (?P<mark>.*?) -->\n+)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *```",
    re.MULTILINE | re.DOTALL,
)
REPLACED = re.compile(r"`(.+?)` becomes `(.*?)`")


@dataclass(frozen=True)
class Block:
    """A block, where it stands, and what is to become of it.

    `reason` is why it is only read; `replaced` are pairs of what stands there and what runs in its place.
    """

    page: str
    line: int
    language: str
    code: str
    reason: str | None = None
    replaced: list[tuple[str, str]] = field(default_factory=list)

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, text: str) -> list[Block]:
    """Raises `ValueError` for a mark that says neither of the two things."""
    blocks = []
    for found in BLOCK.finditer(text):
        mark, code = found["mark"] or "", re.sub(f"^{found['indent']}", "", found["code"], flags=re.MULTILINE)
        line = text[: found.start("code")].count("\n") + 1
        reason = mark.removeprefix("is read only, ") if mark.startswith("is read only, ") else None
        replaced = REPLACED.findall(mark)
        if mark and not reason and not replaced:
            raise ValueError(f"{page}:{line}: the mark {mark!r} says neither why nor what is replaced.")
        if missing := [old for old, _ in replaced if old not in code]:
            raise ValueError(f"{page}:{line}: {missing[0]!r} does not stand in the block.")
        blocks.append(Block(page, line, found["language"], code, reason, replaced))
    return blocks


def commands_of(code: str) -> list[list[str]]:
    """The commands of a shell block as words, without comments, variables and `cd`-like lines of the shell's own."""
    lines = code.replace("\\\n", " ").replace("&&", "\n").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [row for row in words if row]


class Page:
    """Runs the blocks of one page in order; names of Python blocks are those of one session."""

    def __init__(self):
        self.names = {"__name__": "__main__"}

    def take(self, block: Block):
        if block.language == "json":
            json.loads(block.code)
        elif block.language == "yaml":
            yaml.safe_load(block.code)
        elif block.language == "python" and block.reason is None:
            self.run_python(block)
        elif block.language == "python":
            self.read_python(block)
        elif block.language == "bash":
            for words in commands_of(small(block)):
                (read_command if block.reason else run_command)(words)

    def run_python(self, block: Block):
        # Lines of errors are those of the page.
        code = compile("\n" * (block.line - 1) + small(block), block.page, "exec")
        exec(code, self.names)

    def read_python(self, block: Block):
        """Parses it, imports what it imports of the package, and looks for names that nothing has made."""
        tree = ast.parse(block.code, block.page)
        made = set(self.names) | set(dir(builtins))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                made |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
                if isinstance(node, ast.ImportFrom) and node.module.startswith("transformers_nextflow"):
                    module = importlib.import_module(node.module)
                    for alias in node.names:
                        getattr(module, alias.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                made.add(node.id)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                made.add(node.name)
            elif isinstance(node, ast.arg):
                made.add(node.arg)
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        assert not used - made, f"{block.place} uses {sorted(used - made)}, which nothing on the page has made."
        # What it would have made, for blocks after it that are only read too.
        self.names |= {name: None for name in made - set(dir(builtins)) if name not in self.names}


def small(block: Block) -> str:
    code = block.code
    for old, new in block.replaced:
        code = code.replace(old, new)
    return code


def run_command(words: list[str]):
    """Runs a command of the package in this process; other programs are not a page's to run."""
    assert words[0] == "transformers-nextflow", f"{shlex.join(words)} is not of this package; mark the block."
    result = command_line.run_command(*words[1:], prog_name=words[0])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"


def read_command(words: list[str]):
    """Checks what can be known without running: subcommands, scripts, their options, extras, targets of make."""
    words = [word for word in words if "=" not in word or not word.split("=")[0].isupper()]
    if "transformers-nextflow" in words[:-1]:  # elsewhere it is the folder of a clone
        rest = words[words.index("transformers-nextflow") + 1 :]
        known = {name for parameter in command_line.command_named(rest[0]).params for name in parameter.opts}
        check_options(rest[1:], known | {"--help"})
    elif scripts := [word for word in words if word.endswith(".py") and (ROOT / word).exists()]:
        source = (ROOT / scripts[0]).read_text() + "".join(
            (ROOT / "src/transformers_nextflow" / name).read_text() for name in ("evaluation/results.py",)
        )
        options = {word for word in words[words.index(scripts[0]) + 1 :] if word.startswith("--")}
        missing = {o for o in options if not re.search(o.lstrip("-").replace("-", "[-_]") + r"\b", source)}
        assert not missing, f"{scripts[0]} has no {sorted(missing)}"
    elif "pip" in words:
        text = (ROOT / "setup.cfg").read_text()
        for extra in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
            for name in extra.split(","):
                assert re.search(rf"^{name} =$", text, re.MULTILINE), f"There is no extra {name}."
    elif words and words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, f"make has no target {words[1]}."


def check_options(words: list[str], known: set[str]):
    unknown = [word for word in words if word.startswith("--") and len(word) > 2 and word.split("=")[0] not in known]
    assert not unknown, f"The command has no {unknown}."
