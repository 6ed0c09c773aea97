"""Reads files packed with gzip, zstandard, bzip2 or xz to their very end: truncated or damaged files are errors.

The standard library's readers of .bz2 and .xz mistake a damaged second stream for the end of the file, and zstandard's
accepts a truncated frame. Here each frame must be complete, and the file must end with a frame.
"""

import bz2
import hashlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

from qwen_moe.errors import UserError
from qwen_moe.packages import check_installed

# Pieces of input are this small, because a piece of a very repetitive file grows about 10,000 times.
_PIECE = 1 << 14


def _zstandard() -> Any:
    import zstandard

    # 2 GiB is the largest window of the format's reference program (--long=31).
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


_UNPACKERS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": _zstandard,
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
}
PACKED_ENDINGS = tuple(_UNPACKERS)
# These formats may have padding zeros after the last frame.
_PADDED = (".gz", ".xz")


def check_unpackers(paths: Iterable[Path]) -> None:
    """Raises UserError if a file of ``paths`` needs a package for unpacking that is not installed."""
    if packed := next((path for path in paths if path.suffix.lower() == ".zst"), None):
        check_installed(f"{packed} is packed with zstandard", "zstandard", otherwise="unpack it first")


class HashedFile(io.RawIOBase):
    """A file that is hashed (SHA-256) while it is read from beginning to end."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.taken = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._file.read(len(buffer))
        self.digest.update(piece)
        self.taken += len(piece)
        buffer[: len(piece)] = piece
        return len(piece)


class _Unpacked(io.RawIOBase):
    """The content of all frames of a packed file, one after another."""

    def __init__(self, path: Path, raw: IO[bytes]) -> None:
        self._path, self._raw = path, raw
        self._ending = path.suffix.lower()
        self._frame: Any = None
        self._frames = 0
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = self._raw.read(_PIECE)
                if not self._input:
                    self._check_end()
                    return 0
            self._output = memoryview(self._unpack())
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _unpack(self) -> bytes:
        if self._frame is None:
            if self._frames and self._ending in _PADDED:
                self._input = self._input.lstrip(b"\0")
                if not self._input:
                    return b""
            self._frame = _UNPACKERS[self._ending]()
        try:
            content = self._frame.decompress(self._input)
        except Exception as error:  # each library has its own exception, and zstandard is imported only if needed
            raise self._damaged(str(error)) from None
        self._input = b""
        if self._frame.eof:
            self._input, self._frame = self._frame.unused_data, None
            self._frames += 1
        return content

    def _check_end(self) -> None:
        if self._frame is not None or not self._frames:
            raise self._damaged("it ends in the middle of a frame" if self._frame is not None else "it is empty")

    def _damaged(self, why: str) -> UserError:
        return UserError(
            f"{self._path} cannot be unpacked ({why}): the file is damaged or truncated; fetch it again, or leave it out"
        )


def open_packed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    """``raw``, the open file ``path``, unpacked as its suffix says; ``raw`` itself if it is not packed.

    Reading raises UserError if the file is truncated or damaged.
    """
    if path.suffix.lower() not in _UNPACKERS:
        return raw
    return io.BufferedReader(_Unpacked(path, raw), buffer_size=1 << 18)
