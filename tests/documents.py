"""What tests of the README and of docs/ share: the pages, and the commands in their code."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parent.parent
READ = [
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md", "docker/**/*.md", "examples/**/*.md")
    for path in sorted(ROOT.glob(pattern))
    if path.name != "report.md"  # written by dsl report
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = ("", "sh", "bash", "console")  # languages of code that is to be typed
OURS = ("dsl", "dsl-server", "dsl-client")
END = ("|", "&", "&&", ";")  # of a command


def blocks(page: Path, *languages: str) -> list[str]:
    """A page's code in these languages. page: from the root."""
    return [code for language, code in FENCE.findall((ROOT / page).read_text()) if language in languages]


def commands(page: Path) -> list[list[str]]:
    """The words of each of our programs' commands in a page's code; '...' in one: and so on."""
    found = []
    for block in blocks(page, *SHELL):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            line = line.removeprefix("$ ")
            if line.split(" ")[0] in OURS and "  " not in line.strip():  # else a view, or a table of arrows
                words = shlex.split(line, comments=True)
                ends = [at for at, word in enumerate(words) if word in END or word[:1] in ("<", ">")]
                found.append([word for word in words[: min(ends, default=len(words))] if word != "..."])
    return found
