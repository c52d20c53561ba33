"""Nothing here unpacks: outputs and caches travel as single files, so no archive can lead astray or burst."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNPACKERS = {"zipfile", "gzip", "bz2", "lzma", "zstandard", "shutil.unpack_archive", "zlib.decompress"}
# The one archive we make ourselves, for the engine.
MAKES_A_TAR = {"runner/executor/holder_image.py"}
# Appended log bytes may come as gzip: one stream, inflated up to a bound.
INFLATES = {"coordinator/api/streams.py"}
UNPACKS = {"unpack_archive", "extractall", "decompress", "decompressobj"}


@pytest.mark.threat("D13")
@pytest.mark.threat("D14")
def test_no_program_of_ours_opens_an_archive() -> None:
    found = set()
    for package in ("coordinator", "runner", "shared"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
                if UNPACKERS & set(names) or ("tarfile" in names and name not in MAKES_A_TAR):
                    found.add(name)
                is_call = isinstance(node, ast.Attribute) and node.attr in UNPACKS
                if is_call and name not in INFLATES:
                    found.add(name)

    assert found == set()
