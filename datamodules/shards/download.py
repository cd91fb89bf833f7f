"""Remote files: downloaded whole into a cache folder, given up when nothing comes, never half taken for whole."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import selectors
import signal
import subprocess
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lightning_modules.errors import ConfigError, DataError
from lightning_modules.files import atomic_file

FIRST_PAUSE_SECONDS = 1.0  # before the second attempt; twice as long before each further one
_BLOCK = 1 << 20
_CURL_SCHEMES = ("http", "https", "ftp", "ftps", "sftp", "scp")


def is_remote(location: str) -> bool:
    """Whether a location is a URL or a ``pipe:`` command, not a local path or ``file:`` URL."""
    return location.startswith("pipe:") or re.match(r"(?!file:)[a-z][a-z0-9+.-]*://", location) is not None


@dataclass(frozen=True)
class Expected:
    """What a whole file is: its size in bytes and the BLAKE2b hash of its content, as far as they are known."""

    size: int | None = None
    digest: str = ""


class _Broken(Exception):
    """An attempt that failed and may be repeated."""


@dataclass(frozen=True)
class Downloads:
    """Fetches remote files.

    Attributes:
        cache_dir: needs room for every remote shard; nothing is evicted.
        stall_seconds: without a single byte for so long, a download is given up and its processes are killed.
        attempts: how often a download is tried.
        most_bytes: a file of unknown size that is larger is given up.
    """

    cache_dir: Path | None = None
    stall_seconds: float = 60.0
    attempts: int = 3
    most_bytes: int = 64 * 1024**3

    def __post_init__(self) -> None:
        if self.stall_seconds <= 0 or self.attempts < 1:
            raise ConfigError(
                f"data.stall_seconds {self.stall_seconds} must be above 0 and data.download_attempts {self.attempts} "
                "at least 1"
            )

    def fetch(self, url: str, expected: Expected | None = None, refresh: bool = False) -> Path:
        """Download ``url`` unless it is in the cache, and return the local file.

        Processes that want the same file at once wait for the one that downloads it.

        Args:
            url: http(s), ftp(s), sftp or scp (by ``curl``), gs (by ``gsutil``), hf://, or ``pipe:command``.
            expected: a cached file of another size is downloaded again, a downloaded one that differs is refused.
            refresh: download even if it is there.

        Raises:
            ConfigError: no ``cache_dir``, or nothing here reads such a URL.
            DataError: the download failed, stalled, or gave something else; or the cache cannot be written.
        """
        expected = expected or Expected()
        path = self.path(url)
        if not refresh and _is_whole(path, expected):
            return path  # a cache may be read-only when it is full of what is needed
        with _alone(path):
            if refresh or not _is_whole(path, expected):
                self._download(url, path, expected)
        return path

    def path(self, url: str) -> Path:
        """Where the file lies, or will."""
        if self.cache_dir is None:
            raise ConfigError(f"{url} is remote: set data.cache_dir to a folder with room for the shards")
        digest = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
        return self.cache_dir / f"{digest}-{re.sub(r'[^A-Za-z0-9._-]+', '_', url)[-40:]}"

    def _download(self, url: str, path: Path, expected: Expected) -> None:
        pause = FIRST_PAUSE_SECONDS
        for attempt in range(1, self.attempts + 1):
            try:
                with atomic_file(path) as target:
                    self._attempt(url, target, expected)
                return
            except _Broken as broken:
                if attempt == self.attempts:
                    raise DataError(
                        f"cannot download {url} ({broken}; attempt {attempt} of {self.attempts}); "
                        "check the address and the network"
                    ) from broken
            time.sleep(pause)
            pause *= 2

    def _attempt(self, url: str, target: BinaryIO, expected: Expected) -> None:
        digest, size = hashlib.blake2b(digest_size=16), 0
        most = self.most_bytes if expected.size is None else expected.size
        with closing(self._blocks(url)) as blocks:
            for block in blocks:
                size += len(block)
                if size > most:
                    raise _Broken(f"it gave more than {most} bytes")
                digest.update(block)
                target.write(block)
        if expected.size not in (None, size):
            raise _Broken(f"it gave {size} bytes, not the {expected.size} of its manifest")
        if expected.digest not in ("", digest.hexdigest()):
            raise _Broken("it gave other bytes than its manifest says")

    def _blocks(self, url: str) -> Generator[bytes, None, None]:
        """What the command for ``url`` prints."""
        with _process(url, self.stall_seconds) as process, selectors.DefaultSelector() as selector:
            assert process.stdout is not None
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if not selector.select(self.stall_seconds):
                    raise _Broken(f"not a byte for {self.stall_seconds:g} s")
                block = os.read(process.stdout.fileno(), _BLOCK)
                if not block:
                    break
                yield block
            try:
                status = process.wait(self.stall_seconds)
            except subprocess.TimeoutExpired:
                raise _Broken(f"its command gave all and did not end within {self.stall_seconds:g} s") from None
            if status:
                raise _Broken(f"exit {status}")


@contextmanager
def _process(url: str, stall_seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    """The command that prints ``url``, in a process group of its own, of which nothing is left afterwards."""
    command, config = _command(url, stall_seconds)
    options = {"stdout": subprocess.PIPE, "bufsize": 0, "start_new_session": True}
    try:
        process: subprocess.Popen[bytes] = subprocess.Popen(
            command, shell=isinstance(command, str), stdin=subprocess.PIPE if config else subprocess.DEVNULL, **options
        )  # type: ignore[call-overload]  # of options
    except OSError as error:
        raise DataError(f"cannot download {url} ({error}); install {command[0]} or copy the shards here") from error
    try:
        if config:
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin:
                process.stdin.write(config.encode())
        yield process
    finally:
        if process.returncode is None:  # else its number may by now be another's
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _command(url: str, stall_seconds: float) -> tuple[str | list[str], str]:
    """What prints a URL's content, and what it reads from its standard input."""
    scheme, _, rest = url.partition(":")
    # curl watches too, for the case that the process that reads from it is killed while nothing comes.
    watched = ["--connect-timeout", f"{stall_seconds:g}", "--speed-limit", "1", "--speed-time", f"{stall_seconds:.0f}"]
    # Without --globoff, [1-5] and {a,b} in a URL would be a request for each.
    curl = ["curl", "--fail", "--silent", "--show-error", "--location", "--globoff", *watched]
    if scheme == "pipe":
        return rest, ""
    if scheme in _CURL_SCHEMES:
        return [*curl, "--", url], ""
    if scheme == "gs":
        return ["gsutil", "cat", url], ""
    if scheme == "hf":
        address, token = _on_the_hub(url)
        # Not as an argument: those are shown to everybody on the machine.
        header = f'header = "Authorization: Bearer {token}"\n' if token else ""
        return [*curl, *(["--config", "-"] if token else []), "--", address], header
    raise ConfigError(f"{url}: nothing here reads {scheme}://; use pipe: with a command that prints the file")


def _on_the_hub(url: str) -> tuple[str, str | None]:
    from huggingface_hub import HfFileSystem, get_token, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_file_system import HfFileSystemResolvedRepositoryPath

    try:
        found = HfFileSystem().resolve_path(url)
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"cannot download {url} ({reason}); check the address and the network") from error
    if not isinstance(found, HfFileSystemResolvedRepositoryPath):
        raise DataError(f"{url} is no file of a model or data set repository; check the address")
    address = hf_hub_url(found.repo_id, found.path_in_repo, repo_type=found.repo_type, revision=found.revision)
    return address, get_token()


def _is_whole(path: Path, expected: Expected) -> bool:
    return path.exists() and expected.size in (None, path.stat().st_size)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds the lock for downloading ``path``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name.partition('-')[0]}.lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise DataError(
            f"cannot write to the cache folder {path.parent}: {error.strerror or error}; give a folder that can be "
            "written to as data.cache_dir"
        ) from error
    with lock:
        yield
