"""What Python's own library says of itself: the docstrings of its functions and classes, by topic.

Real text that every machine with Python has, in several thousand pieces; to tell what a piece is about is the
task. Under the PSF licence, like Python; nothing is downloaded, and nothing of it is imported or run.
"""

import ast
import re
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

LENGTH = 48  # tokens of a text: longer ones are cut, shorter ones filled up
WORDS = 4096  # different tokens
PADDING = 0

TOPICS = {
    "files": "os shutil pathlib zipfile tarfile gzip bz2 lzma tempfile fileinput glob filecmp mimetypes "
    "genericpath posixpath ntpath _pyio zipimport dbm shelve",
    "language": "ast inspect dis importlib tokenize symtable code codeop pdb bdb traceback unittest doctest "
    "typing types dataclasses enum abc functools contextlib pkgutil pydoc trace pickletools runpy",
    "network": "asyncio http urllib socket socketserver ssl smtplib ftplib imaplib poplib xmlrpc selectors "
    "email ipaddress webbrowser mailbox wsgiref",
    "numbers": "_pydecimal decimal fractions statistics random numbers datetime _pydatetime calendar heapq "
    "bisect colorsys _strptime secrets hashlib hmac",
    "processes": "multiprocessing subprocess threading concurrent queue sched signal pty _threading_local",
    "text": "json xml html csv configparser string textwrap re difflib argparse gettext locale codecs "
    "encodings plistlib pprint optparse shlex getopt logging",
}


class Texts(Dataset[tuple[Tensor, int]]):
    """Tokens (LENGTH,) int64, and the topic's number."""

    def __init__(self, texts: Sequence[tuple[str, int]]) -> None:
        self._texts = texts
        self.classes = sorted(TOPICS)  # their names, which the clients of a run compare

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        text, topic = self._texts[index]
        return encoded(text), topic


def sets() -> tuple[Texts, Texts]:
    """To train on, and to test on: of every fifth text, by a number that is made of its own words."""
    train, test = list[tuple[str, int]](), list[tuple[str, int]]()
    for text, topic in dict(_docstrings()).items():  # each text once
        (test if zlib.crc32(text.encode()) % 5 == 0 else train).append((text, topic))
    return Texts(train), Texts(test)


def encoded(text: str) -> Tensor:
    """Each word as a number made of its letters: no vocabulary, so none that clients must agree on, or that
    would tell of their texts."""
    words = re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]", text.lower())[:LENGTH]
    numbers = [1 + zlib.crc32(word.encode()) % (WORDS - 1) for word in words]
    return torch.tensor(numbers + [PADDING] * (LENGTH - len(numbers)))


def _docstrings() -> Iterator[tuple[str, int]]:
    library = Path(sysconfig.get_path("stdlib"))
    for topic, name in enumerate(sorted(TOPICS)):
        for module in TOPICS[name].split():
            for file in sorted([*library.glob(f"{module}.py"), *(library / module).rglob("*.py")]):
                if not {"test", "tests"} & set(file.parts):
                    yield from ((text, topic) for text in _of_file(file))


def _of_file(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_bytes())):
        described = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if described and (text := ast.get_docstring(node)):
            yield text
