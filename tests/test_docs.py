"""What the README and docs/ say is so: links lead somewhere, commands parse, quoted lines are ones that the
programs print, and what is generated is fresh."""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

import dsl_client.__main__
import dsl_lab.__main__
import dsl_server.__main__
from common.wire.rpc import RPCS
from tests.documents import FENCE, READ, ROOT, SHELL, blocks, commands
from tools import pages, settings

PROGRAMS = {"dsl": dsl_lab.__main__, "dsl-server": dsl_server.__main__, "dsl-client": dsl_client.__main__}


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", (ROOT / page).read_text()))


# ---------------------------------------------------------------- links


def slug(heading: str) -> str:
    """The anchor that a heading has: by GitHub, and by the site, which differ in doubled hyphens alone."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[\s]", "-", re.sub(r"[^\w\- ]", "", words))


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", (ROOT / page).read_text())
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", READ, ids=str)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)", prose(page)):
        if ":" in target:
            continue
        path = (ROOT / page.parent / target).resolve() if target else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path), f"{page}: {target}#{anchor}; there are {sorted(anchors(path))}"
            assert "--" not in anchor, f"{page}: {anchor} is another on the site"


def test_the_site_has_every_page_in_its_menu() -> None:
    def named(entries: Any) -> Iterator[str]:
        for entry in entries:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else named(value)

    menu = list(named(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]))
    assert sorted(menu) == sorted(str(pages.place(page)) for page in pages.pages())


def test_a_page_s_links_follow_it_to_its_place_in_the_site(tmp_path: Path) -> None:
    pages.lay_out(tmp_path)
    assert "](benchmarks/memory/README.md)" in (tmp_path / "paper.md").read_text()
    assert "](../accuracy/README.md)" in (tmp_path / "benchmarks/memory/README.md").read_text()
    assert (tmp_path / "benchmarks/memory/results.png").exists()
    proto = tmp_path / "protos/dsl/v1/split_learning.proto.txt"
    assert "](protos/dsl/v1/split_learning.proto.txt)" in (tmp_path / "protocol.md").read_text()
    assert proto.read_text() == (ROOT / "protos/dsl/v1/split_learning.proto").read_text()


# ---------------------------------------------------------------- commands


COMMANDS = [(page, words) for page in READ for words in commands(page)]


class Parsed(BaseException):
    """The flags are right; nothing is started."""


@pytest.fixture
def only_parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parse = tyro.cli

    def parsed(*arguments: Any, **options: Any) -> None:
        parse(*arguments, **options)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", parsed)
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text("epochs = 3\n")  # for --config


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: str(value) if value else "")
@pytest.mark.usefixtures("only_parse")
def test_every_command_parses(page: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = words
    with pytest.raises((Parsed, SystemExit)) as ended:
        PROGRAMS[program]._main(arguments)
    wrong = isinstance(ended.value, SystemExit) and ended.value.code  # 0: --print-completion and the like
    assert not wrong, f"{page}: {shlex.join(words)}\n{capsys.readouterr()}"


def test_commands_were_found() -> None:
    assert len(COMMANDS) > 40
    assert {words[0] for _, words in COMMANDS} == set(PROGRAMS)


@pytest.mark.parametrize("page", READ, ids=str)
def test_every_make_target_and_script_is_there(page: Path) -> None:
    targets = re.sub(r"\\\n", " ", (ROOT / "Makefile").read_text())
    for block in blocks(page, *SHELL):
        for target in re.findall(r"^make ([a-z-]+)", block, re.MULTILINE):
            assert re.search(rf"^[^\n:=]*\b{target}\b[^\n:=]*:", targets, re.MULTILINE), f"{page}: {target}"
        for script in re.findall(r"^python ([\w/.]+[.]py)", block, re.MULTILINE):
            assert (ROOT / script).exists(), f"{page}: {script}"


# ---------------------------------------------------------------- what programs print


def templates() -> Iterator[tuple[re.Pattern[str], int]]:
    """Every text in the programs' source, what is filled in being anything; and how much of it is fixed."""
    for folder in ("common", "dsl_server", "dsl_client", "dsl_lab"):
        for module in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(module.read_text())):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                fixed = [part.value if isinstance(part, ast.Constant) else None for part in parts]
                if any(isinstance(text, str) for text in fixed):
                    pattern = "".join(".+?" if text is None else re.escape(str(text)) for text in fixed)
                    yield re.compile(pattern), sum(len(str(text)) for text in fixed if text is not None)


QUOTED = [
    (page, re.sub(r"^dsl(-server|-client)?: error: ", "", line))
    for page in map(Path, ("docs/faq.md", "docs/protocol.md"))
    for block in blocks(page, "output")
    for line in block.splitlines()
]


def test_every_quoted_line_is_one_that_a_program_prints() -> None:
    known = [pattern for pattern, fixed in templates() if fixed >= 12]
    how = "went away before the end of the run"  # after whoever did
    assert any(pattern.pattern == re.escape(how) for pattern in known)
    for page, line in QUOTED:
        text = re.sub(rf"^client \d \([\w-]+\) {how}$", how, line)
        assert any(pattern.fullmatch(text) for pattern in known), f"{page}: {line}"
    assert len(QUOTED) > 15


def test_every_call_of_the_protocol_is_told_of() -> None:
    told = (ROOT / "docs/protocol.md").read_text()
    assert [which.name for which in RPCS if f"\n| `{which.name}` |" not in told] == []


# ---------------------------------------------------------------- what is generated


def test_the_settings_are_those_of_the_programs() -> None:
    ours = (ROOT / "docs/settings.md").read_text()
    assert ours == settings.page(), "docs/settings.md is stale: run python tools/settings.py"
