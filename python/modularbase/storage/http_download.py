"""A download over HTTP that goes on where it stopped, within a run and between runs."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modularbase.storage.digest import CHUNK_BYTES, OnBytes

RETRY_WAIT_S = 1.0

_N_FRUITLESS_MAX = 5
_TIMEOUT_S = 30.0
_CUT = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)


class DownloadError(Exception):
    """A download that was given up; `status` is the server's answer, if it gave one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def download(url: str, target: Path, n_bytes: int, on_bytes: OnBytes) -> None:
    """Fetches url into target, appending to what is already there.

    Args:
        url: http or https.
        target: File to complete; stays as far as it came if this fails or is interrupted.
        n_bytes: Size of the whole file.
        on_bytes: Called with the bytes that are there.

    Raises:
        DownloadError: The server refuses, or several attempts in a row brought nothing.
        OSError: The file cannot be written.
    """
    _check_scheme(url)
    n_fruitless, n_best = 0, _size(target)
    while _size(target) != n_bytes:
        time.sleep(RETRY_WAIT_S * n_fruitless)
        trouble = _attempt(url, target, n_bytes, on_bytes)
        if _size(target) > n_bytes:
            target.unlink()
            raise DownloadError(f"the server sent more than the {n_bytes} bytes it announced")
        # Against the best so far: a server that ignores ranges starts over every time.
        n_fruitless = 0 if _size(target) > n_best else n_fruitless + 1
        n_best = max(n_best, _size(target))
        if n_fruitless >= _N_FRUITLESS_MAX:
            raise DownloadError(f"gave up after {n_fruitless} attempts: {trouble}")


def size_of(url: str) -> int:
    """The size the server announces for a file.

    Raises:
        DownloadError: The server cannot be reached, refuses, or does not say.
    """
    with _opened(url, "HEAD") as response:
        length = response.headers.get("Content-Length", "")
    if not length.isdecimal():
        raise DownloadError("the server does not say how large the file is")
    return int(length)


def fetch(url: str, max_bytes: int) -> bytes:
    """A small file, in one attempt.

    Raises:
        DownloadError: The server cannot be reached or refuses, or the file is larger.
    """
    with _opened(url, "GET") as response:
        try:
            content = response.read(max_bytes + 1)
        except _CUT as error:
            raise DownloadError(f"the connection was cut: {error}") from error
    if len(content) > max_bytes:
        raise DownloadError(f"the server sent more than {max_bytes} bytes")
    return bytes(content)


@contextlib.contextmanager
def _opened(url: str, method: str) -> Iterator[Any]:
    _check_scheme(url)
    headers = {"User-Agent": "modularbase", "Accept-Encoding": "identity"}
    try:
        request = urllib.request.Request(_in_ascii(url), headers=headers, method=method)
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        raise DownloadError(f"the server answered {error.code}", error.code) from error
    except (*_CUT, ValueError) as error:  # ValueError: no address at all
        raise DownloadError(str(error) or type(error).__name__) from error
    with response:
        yield response


def _check_scheme(url: str) -> None:
    if not url.startswith(("http://", "https://")):
        raise DownloadError(f"not an HTTP address: {url}")


def _in_ascii(url: str) -> str:
    """Letters of other scripts as servers want them; what is encoded already stays."""
    return urllib.parse.quote(url, safe="%:/?#[]@!$&'()*+,;=~")


def _attempt(url: str, target: Path, n_bytes: int, on_bytes: OnBytes) -> str:
    """Fetches as much as it can; returns why it ended."""
    n_have = _size(target)
    headers = {"User-Agent": "modularbase", "Accept-Encoding": "identity"}
    if n_have:
        headers["Range"] = f"bytes={n_have}-"
    try:
        request = urllib.request.Request(_in_ascii(url), headers=headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
            # A server may ignore the range and send everything.
            resumes = response.status == 206
            n_done = n_have if resumes else 0
            with target.open("ab" if resumes else "wb") as file:
                while n_done <= n_bytes and (chunk := response.read(CHUNK_BYTES)):
                    file.write(chunk)
                    n_done += len(chunk)
                    on_bytes(n_done)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # what is here does not belong to this file
            target.unlink(missing_ok=True)
        elif error.code < 500 and error.code not in (408, 429):
            raise DownloadError(f"the server answered {error.code}", error.code) from error
        return f"the server answered {error.code}"
    except _CUT as error:
        return str(error) or type(error).__name__
    return "the connection was cut"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
