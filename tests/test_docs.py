"""The pages in docs/: their blocks run, their figures stand in LOG.md, every method has one, and they build.

Blocks of a page run in order, in one directory, with the built-in model replaced by a tiny random one:

    python, yaml   `# name.ext` in the first line: a file to write; other python blocks are executed
    text           after a python block: what it prints
    sh             commands that succeed
    console        `$ command` and what it prints
    json           shown, not run

`…` in what is printed stands for anything.

`<!-- not run: REASON -->` before a block keeps it from running; NOT_RUN counts these.
"""

import collections
import contextlib
import inspect
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import encoders
import pytest
import tiny

import prunella
from prunella import registry
from prunella.allocate import allocations
from prunella.heal import groups
from prunella.model.built_in import BUILT_IN

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
NOT_RUN = {
    "installs packages": 1,
    "needs a full disk": 1,
    "needs a machine that is too small": 1,
    "starts processes": 2,
    "needs data sets of the hub": 2,
    "takes minutes": 2,
}
BLOCK = re.compile(r"(?:^<!-- not run: (.*) -->\n+)?^```(\S+).*\n((?:.*\n)*?)^```$", re.MULTILINE)


@dataclass(frozen=True)
class Code:
    """A fenced block of a page."""

    language: str
    text: str
    excuse: str | None

    @property
    def file(self) -> str | None:
        """The file that it is to be written to."""
        match = re.match(r"# ([\w./-]+\.\w+)\n", self.text)
        return match[1] if match else None


def blocks(page: str) -> Iterator[Code]:
    for excuse, language, text in BLOCK.findall((DOCS / page).read_text(encoding="utf-8")):
        if not language.startswith("{"):
            assert language in ("python", "yaml", "sh", "console", "text", "json"), f"{page}: a block of {language}"
            yield Code(language, text, excuse or None)


@pytest.fixture(scope="module")
def built_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which the built-in models are tiny random ones. Read only."""
    cache = tmp_path_factory.mktemp("docs")
    encoder = cache / "built-in" / f"minilm-l6-{BUILT_IN['minilm-l6'].version}"
    encoders.write(encoder, encoders.build("bert", ""), encoders.SENTENCES)
    path = cache / "built-in" / f"smollm2-135m-{BUILT_IN['smollm2-135m'].version}"
    tiny.build("llama", num_hidden_layers=3, max_position_embeddings=128).save_pretrained(path)
    tiny.write_tokenizer(path)
    return cache


@pytest.fixture
def room(built_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory to run a page in; what it imports of its own is forgotten."""
    monkeypatch.setenv("PRUNELLA_CACHE", str(built_in))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # as of a program that runs there
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").resolve().is_relative_to(tmp_path.resolve()):
            del sys.modules[name]


@pytest.mark.parametrize("page", [page for page in PAGES if any(True for _ in blocks(page))])
def test_the_blocks_of_a_page_run(page, room, run):
    names: dict[str, object] = {"__name__": page}
    printed = ""
    for block in blocks(page):
        if block.excuse is not None:
            continue
        if block.file is not None:
            (room / block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(compile(block.text, page, "exec"), names)
            printed = stdout.getvalue()
        elif block.language == "text":
            compare(printed, block.text)
        elif block.language == "sh":
            for command in block.text.splitlines():
                execute(command, run)
        elif block.language == "console":
            for command, expected in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block.text, re.MULTILINE):
                compare(execute(command, run, may_fail=True), expected)
        else:
            assert block.language == "json", f"{page}: a {block.language} block without a file name"


def compare(printed: str, expected: str) -> None:
    wanted = ".*".join(re.escape(part) for part in " ".join(expected.split()).split("…"))
    assert re.fullmatch(wanted, " ".join(printed.split())), f"expected: {expected}\nprinted: {printed}"


def execute(command: str, run: Callable[..., object], *, may_fail: bool = False) -> str:
    """Run one command, `prunella` in this process; everything that it printed."""
    words = shlex.split(command, comments=True)
    if not words:
        return ""
    if words[0] == "prunella":
        outcome = run(*words[1:])
        code, printed = outcome.code, outcome.out + outcome.err
    else:
        done = subprocess.run(
            ["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        code, printed = done.returncode, done.stdout
    assert may_fail or code == 0, f"{command}\n{printed}"
    return printed


def test_every_block_that_is_not_run_is_counted_here():
    found = collections.Counter(block.excuse for page in PAGES for block in blocks(page) if block.excuse)
    assert found == NOT_RUN


@pytest.mark.parametrize(("folder", "known"), [("steps", registry.steps), ("allocations", allocations)])
def test_every_method_has_a_page(folder, known):
    assert {path.stem for path in (DOCS / folder).glob("*.md")} == {*known, "index"}


@pytest.mark.parametrize("page", [page for page in PAGES if "\n## Measured\n" in (DOCS / page).read_text()])
def test_measured_figures_stand_in_the_log(page):
    section = (DOCS / page).read_text().split("\n## Measured\n")[1].split("\n## ")[0]
    log = set(figures((ROOT / "LOG.md").read_text() + (DOCS / "log-before.md").read_text()))
    assert not set(figures(section)) - log


def figures(text: str) -> list[str]:
    return re.findall(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?", text)


def test_every_option_is_explained():
    for method in (*registry.steps.values(), *allocations.values()):
        said = inspect.getdoc(method.function) or ""
        for option in method.options:
            assert f"\n    {option}: " in said, f"{method.name}.{option}"


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        assert (tmp_path / page).with_suffix(".html").is_file()
    front = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "methods.svg" in front
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("The methods beside each other")[1].split("![")[0]
    assert set(figures(table)) <= set(figures(re.sub(r"<[^>]*>", " ", front)))


def test_every_public_name_stands_in_the_reference():
    page = (DOCS / "reference.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\.\. auto\w+:: prunella\.(\w+)(?:\(\))?$", page, re.MULTILINE)) == set(prunella.__all__)


@pytest.mark.parametrize("name", [name for name in prunella.__all__ if inspect.isfunction(getattr(prunella, name))])
def test_every_argument_of_a_public_function_is_explained(name):
    function = getattr(prunella, name)
    said = (inspect.getdoc(function) or "").partition("Args:\n")[2].partition("\n\n")[0]
    names = [name for several in re.findall(r"^    (\w.*?): ", said, re.MULTILINE) for name in several.split(", ")]
    assert sorted(names) == sorted(inspect.signature(function).parameters)


def test_the_page_on_the_architecture_names_what_there_is():
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    source = ROOT / "src" / "prunella"
    for path in re.findall(r"`([\w/]+(?:\.py|/))`", page):
        assert (source / path).exists() or (ROOT / path).exists(), path
    nouns = re.findall(r"^\| `(\w+)` \| `([\w/.]+)` \|", page, re.MULTILINE)
    assert len(nouns) > 20
    for noun, path in nouns:
        assert f"\nclass {noun}" in (source / path).read_text(encoding="utf-8"), noun


def test_every_healing_method_has_its_options_in_the_page():
    page = (DOCS / "healing.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^```{options} healing (\S+)$", page, re.MULTILINE)) == set(groups)
