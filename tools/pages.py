"""Lays out the documentation site in build/site, for zensical; with --build builds it too, into site/.

The Markdown is written to be read where it lies, so its links are those of the repository. Here the pages of
docs/ come to the top, those of benchmarks/ beside them, and links follow; what else they link to is copied.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUT = ROOT / "build" / "site"
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
PLAIN = (".md", ".proto", ".toml", ".yaml", ".py", ".jsonl")  # as text, which a browser shows


def place(source: Path) -> Path:
    """Where a file of the repository lies in the site. source: from the root."""
    if source.parts[0] == "docs":
        return Path(*source.parts[1:])
    if source.suffix in PLAIN and source not in _PAGES:
        return source.with_name(source.name + ".txt")
    return source


def pages() -> list[Path]:
    """The Markdown files that become pages, from the root."""
    found = [
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("benchmarks/README.md"),
        *ROOT.glob("benchmarks/*/README.md"),
    ]
    return sorted(path.relative_to(ROOT) for path in found)


def lay_out(out: Path = OUT) -> None:
    """Writes pages, and all that they link to. Raises FileNotFoundError where a link leads nowhere."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ROOT / "docs", out, ignore=lambda _, names: [n for n in names if n.endswith(".md")])
    for page in pages():
        target = out / place(page)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_moved(page, out))


def _moved(page: Path, out: Path) -> str:
    """The page's text, its links as they are in the site."""

    def link(found: re.Match[str]) -> str:
        before, target, after = found.groups()
        if ":" in target:
            return found[0]
        path = Path(os.path.normpath(page.parent / target))
        if (ROOT / path).is_dir():
            path /= "README.md"
        if not (ROOT / path).is_file():
            raise FileNotFoundError(f"{page}: {target} leads nowhere")
        to = place(path)
        if path not in _PAGES:
            (out / to).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, out / to)
        return before + os.path.relpath(to, place(page).parent) + after

    parts = FENCED.split((ROOT / page).read_text())  # text and code in turn
    parts[::2] = [LINK.sub(link, text) for text in parts[::2]]
    return "".join(parts)


_PAGES = frozenset(pages())


def build() -> int:
    """Exit code: not 0 where zensical has anything to warn of."""
    command = [str(Path(sys.executable).parent / "zensical"), "build", "--clean", "--strict"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, end="")
    return done.returncode or int("warning" in done.stdout.lower())


if __name__ == "__main__":
    lay_out()
    if "--build" in sys.argv[1:]:
        sys.exit(build())
