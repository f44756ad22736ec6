"""README and docs: limits, links, names and commands.

A ```bash block is executed in a copy of the repository, after the blocks above it. One that takes long, or
needs the network, a display or data that is not here, has the line <!-- slow --> before it. Then its commands
are parsed: the script exists, its flags are valid, and each file is in the repository or made by a command
above. <!-- elsewhere --> marks a block for another machine, which is not checked.
"""

import argparse
import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
MOST_LINES, MOST_WORDS = 200, 1800
SECONDS = 60  # limit of a block that is executed

# Words of versions before 0.6 and what stands for them now. Edit this list; each pattern matches whole words.
DIALECT = {
    r"dreams?|dreamt|dreamed|dreaming": "rollout, generated",
    r"foretells?|foretold|foretelling|foresees?|foreseen|foresaw": "predict",
    r"nought": "0",
    r"how-manieth": "index",
    r"charged": "loss",
    r"obeys?|obeyed|obedience|obedient": "control, follow the command",
    r"beliefs?": "overlay",
}
# What documents the renames may hold such words: this file, and lines of these files that match.
DOCUMENTS_RENAMES = {"tests/test_docs.py": r"", "CHANGELOG.md": r"->", "tools/convert_checkpoint.py": r"\":"}

# Files that a script makes when no flag says where, and flags (argparse destinations) that name what is made.
MADE_BY_DEFAULT = {
    "train.py": "runs/world",
    "vq_vae/train_vqvae.py": "runs/vqvae",
    "vq_vae/train_decoder.py": "runs/decoder",
    "depth/train_depth.py": "runs/depth",
    "make data": "data/luanti",
}
OUTPUTS = {"out", "out_dir", "target", "save_actions", "OUT_DIR", "CACHE_DIR"}
OUTPUT_FLAGS = {"-d", "-t", "--local-dir"}  # of unzip, ln and hf
QUICK_PROGRAMS = {"python", "echo"}  # what an executed block may call


def repository_files() -> list[str]:
    """All files of the repository that git does not ignore, relative to its root."""
    try:
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git repository")
    return [name for name in listed.splitlines() if (ROOT / name).is_file()]


# ---------------------------------------------------------------- limits and words


def test_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert len(text.split()) <= MOST_WORDS


def test_no_words_of_the_old_dialect():
    pattern = re.compile("|".join(rf"\b(?:{words})\b" for words in DIALECT), re.IGNORECASE)
    found = []
    for name in repository_files():
        if not name.endswith((".md", ".py")):
            continue
        exempt = re.compile(DOCUMENTS_RENAMES.get(name, r"(?!)"))
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
            if (match := pattern.search(line)) and not exempt.search(line):
                found.append(f"{name}:{number}: {match.group()}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


def test_citation_has_what_the_format_requires():
    keys = dict(re.findall(r"^([a-z-]+):[ ]*(.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert keys["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license"} <= keys.keys()


# ---------------------------------------------------------------- links and names


def without_code(text: str) -> str:
    """Markdown without fenced and inline code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def test_links_resolve():
    broken = []
    for name in repository_files():
        if not name.endswith(".md"):
            continue
        page = ROOT / name
        for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or anchor and target.suffix == ".md" and anchor not in anchors(target):
                broken.append(f"{name}: {link}")
    assert not broken, "\n".join(broken)


def defined_names(path: Path) -> set[str]:
    """Functions, classes, methods ("Class.method") and constants that a module defines."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
        for target in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(target, ast.Name):
                names.add(target.id)
    return names


def test_where_to_find_names_what_exists():
    text = (ROOT / "docs/how-it-works.md").read_text().partition("## Where to find")[2]
    places = re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", text)
    assert len(places) >= 10
    for path, listed in places:
        missing = set(re.findall(r"`([\w.]+)`", listed)) - defined_names(ROOT / path)
        assert not missing, f"{path} does not define {', '.join(sorted(missing))}"


def test_file_map_is_complete():
    section = README.read_text().partition("## File map")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`([\w.]+/?)`", "\n".join(re.findall(r"^\|(.*?)\|", section, re.MULTILINE))))
    there = {name.partition("/")[0] for name in repository_files() if "/" in name or name.endswith(".py")}
    there = {name if name.endswith(".py") else f"{name}/" for name in there if not name.startswith(".")}
    assert listed == there


# ---------------------------------------------------------------- commands


@dataclass
class Block:
    """A ```bash block of a page; `mark` is "slow", "elsewhere" or empty."""

    page: Path
    line: int
    mark: str
    text: str

    @property
    def name(self) -> str:
        """Page and line, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass
class Command:
    """One simple command of a shell line, and the files that it is redirected to."""

    words: list[str]
    redirected: list[str] = field(default_factory=list)


def blocks_of(page: Path) -> list[Block]:
    """The page's ```bash blocks in order."""
    text = page.read_text()
    pattern = re.compile(r"(?:^<!-- (\w+) -->\n)?^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [
        Block(page, text.count("\n", 0, m.start(2)) + 1, m.group(1) or "", m.group(2))
        for m in pattern.finditer(text)
    ]


def commands_of(block: Block) -> list[Command]:
    """The simple commands of a block: split at ; | & and parentheses, without variables set before them."""
    commands = []
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        command, redirect = Command([]), ""
        for word in [*lexer, ";"]:
            if set(word) <= set("<>&") and set(word) & set("<>"):
                redirect = word
            elif set(word) <= set("();|&"):
                while command.words and re.match(r"[A-Z_]+=|do$", command.words[0]):
                    command.words.pop(0)
                if command.words:
                    commands.append(command)
                command, redirect = Command([]), ""
            elif redirect:
                if ">" in redirect:
                    command.redirected.append(word)
                redirect = ""
            else:
                command.words.append(word)
    return commands


class _ParsedArguments(BaseException):
    """Ends a script's `main` once its arguments are parsed."""

    def __init__(self, namespace: argparse.Namespace):
        self.namespace = namespace


def parse(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A script's arguments as it parses them itself: {destination or constant: value}."""
    if "train" in Path(script).stem:  # these have constants, not argparse; to run them would train
        constants = defined_names(ROOT / script)
        values = dict(word.split("=", 1) for word in arguments)
        unknown = [name for name in values if name not in constants or not name.isupper()]
        assert not unknown, f"{script} has no constant {', '.join(unknown)}"
        return values
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    original = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *args, **kwargs):
        raise _ParsedArguments(original(parser, *args, **kwargs))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [script, *arguments])
        try:
            module.main()
        except _ParsedArguments as parsed:
            return vars(parsed.namespace)
        except SystemExit:
            pytest.fail(f"python {script} {shlex.join(arguments)}: its arguments are not valid")
    raise AssertionError(f"{script} has no argparse parser")


def paths_in(value: object) -> list[str]:
    """The paths in an argument's value: Path objects, and words with a slash and no wildcard or variable."""
    if isinstance(value, (list, tuple)):
        return [path for item in value for path in paths_in(item)]
    text = str(value).removeprefix("@")
    is_path = isinstance(value, Path) or isinstance(value, str) and "/" in text and "://" not in text
    return [text] if is_path and not re.search(r"[$*\s]", text) and text != "-" else []


def check_command(command: Command, made: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks a command's script, flags and input files, and adds what it makes to `made`."""
    program, *rest = command.words
    made.update(command.redirected)
    if program == "make":
        targets = [word for word in rest if "=" not in word]
        known = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(targets) <= set(known), f"the Makefile has no target {targets}"
        made.update(MADE_BY_DEFAULT[key] for t in targets if (key := f"make {t}") in MADE_BY_DEFAULT)
    elif program == "mkdir":
        made.update(word for word in rest if not word.startswith("-"))
    elif program == "python" and rest[0] == "-c":
        compile(rest[1], "-c", "exec")
    elif program == "python":
        script, *arguments = rest
        assert (ROOT / script).is_file(), f"{script} does not exist"
        values = parse(script, arguments, monkeypatch)
        outputs = {path for name in OUTPUTS & values.keys() for path in paths_in(values[name])}
        inputs = {path for name in values.keys() - OUTPUTS for path in paths_in(values[name])}
        for path in inputs:
            known = any(Path(path).is_relative_to(m) or Path(m).is_relative_to(path) for m in made)
            assert known or (ROOT / path).exists(), f"{path} is neither here nor made by a command above"
        made.update(outputs or {MADE_BY_DEFAULT[s] for s in [script] if s in MADE_BY_DEFAULT})
    else:
        made.update(after for word, after in zip(rest, rest[1:], strict=False) if word in OUTPUT_FLAGS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_valid(page: Path, monkeypatch: pytest.MonkeyPatch):
    made: set[str] = set()
    for source in dict.fromkeys([README, page]):  # a page follows the README
        for block in blocks_of(source):
            assert block.mark in ("", "slow", "elsewhere"), f"{block.name}: unknown mark {block.mark}"
            for command in commands_of(block) if block.mark != "elsewhere" else []:
                try:
                    check_command(command, made, monkeypatch)
                except AssertionError as error:
                    pytest.fail(f"{block.name}: {shlex.join(command.words)}: {error}")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's files, with `python` on a path of its own."""
    target = tmp_path_factory.mktemp("clone")
    for name in repository_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target / name)
    python = target / ".bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return target


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(not b.mark for b in blocks_of(p))], ids=lambda page: page.name
)
def test_quick_commands_run(page: Path, clone: Path):
    environment = dict(
        os.environ, PATH=f"{clone / '.bin'}{os.pathsep}{os.environ['PATH']}", OMP_NUM_THREADS="1"
    )
    for block in blocks_of(page):
        if block.mark:
            continue
        programs = {command.words[0] for command in commands_of(block)}
        assert programs <= QUICK_PROGRAMS, f"{block.name}: mark it <!-- slow -->: calls {programs}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.text],
            cwd=clone, env=environment, capture_output=True, text=True, timeout=SECONDS,
        )  # fmt: skip
        assert not done.returncode, f"{block.name}: status {done.returncode}\n{done.stderr[-2000:]}"
