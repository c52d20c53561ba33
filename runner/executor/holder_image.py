"""The program that holds a network: it waits for ever. Made byte by byte, so none is fetched."""

import io
import struct
import tarfile
from typing import Final

NAME: Final = "buildmill/holder:1"
PROGRAM: Final = "/hold"

_BASE: Final = 0x400000
_HEADERS: Final = 64 + 56
_EM_X86_64: Final = 62
_EM_AARCH64: Final = 183

# pause() again and again; where there is no pause, ppoll(NULL, 0, NULL, NULL)
_X86_64: Final = bytes.fromhex("b822000000 0f05 ebf7")  # mov eax,34; syscall; jmp to the start
_AARCH64: Final = struct.pack(
    "<7I",
    0xD2800000,  # mov x0, #0
    0xD2800001,  # mov x1, #0
    0xD2800002,  # mov x2, #0
    0xD2800003,  # mov x3, #0
    0xD2800928,  # mov x8, #73
    0xD4000001,  # svc #0
    0x17FFFFFA,  # b to the start
)
_CODES: Final = {"amd64": (_EM_X86_64, _X86_64), "arm64": (_EM_AARCH64, _AARCH64)}


def make_image_tar(architecture: str) -> bytes | None:
    """The image's only file as a tar, or None for a processor that we have no program for."""
    program = make_program(architecture)
    if program is None:
        return None
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        entry = tarfile.TarInfo(PROGRAM.lstrip("/"))
        entry.size, entry.mode = len(program), 0o755
        tar.addfile(entry, io.BytesIO(program))
    return stream.getvalue()


def make_program(architecture: str) -> bytes | None:
    """A static ELF program of one segment."""
    if architecture not in _CODES:
        return None
    machine, code = _CODES[architecture]
    size = _HEADERS + len(code)
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, _BASE + _HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return identity + header + segment + code
