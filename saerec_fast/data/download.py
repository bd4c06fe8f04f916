"""MovieLens from GroupLens into a cache of the user's, with checksums and resume.

The terms of these data forbid passing them on, so that nothing of them comes with this package.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

try:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
except ImportError:
    raise ImportError("saerec_fast.data needs rich: pip install 'saerec-fast[study]'") from None

GROUPLENS = "https://files.grouplens.org/datasets/movielens"
NAMES = ("ml-100k", "ml-1m", "ml-20m", "ml-25m", "ml-32m")
TIMEOUT = 10.0
"""Seconds to wait for a connection, and for the next bytes on one."""
ATTEMPTS = 3
CHUNK = 1 << 18
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO})
"""Trouble on this side, which the network is not to be blamed for."""

RECBOLE = "recbole==1.2.1"
RECBOLE_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
RECBOLE_FOLDER = "recbole/dataset_example/ml-100k"
RECBOLE_FILES = ("ml-100k.inter", "ml-100k.item")
"""Last the file without which the folder is not recognised as a data set."""

TERMS = """\
MovieLens 100K, usage licence in short (the full text is in the README of GroupLens' archive,
https://files.grouplens.org/datasets/movielens/ml-100k-README.txt):
- The data may be used for research purposes.
- Do not state or imply any endorsement from the University of Minnesota or the GroupLens Research Group.
- Acknowledge the use of the data in publications that result from it.
- Do not redistribute the data without separate permission.
- Do not use them for commercial or revenue-bearing purposes without permission from a faculty member of GroupLens.
- They come without any warranty.
"""
NO_REDISTRIBUTION = "MovieLens data must not be passed on: do not commit or publish any file of this folder."


class DownloadError(RuntimeError):
    """No source gave the data; the message says why and what to do by hand."""


class _Unreachable(Exception):
    """A source does not answer, or not with the file."""


class _Damaged(Exception):
    """A file arrived and is not what it should be."""


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/saerec-fast``, by default ``~/.cache/saerec-fast``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says to ignore relative paths.
    root = Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache"
    return root / "saerec-fast"


def download(
    name: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    _base_url: str = GROUPLENS,
) -> Path:
    """Fetch a MovieLens data set unless the cache has it.

    The archive comes from GroupLens, is checked against the md5 sum published beside it and unpacked. An interrupted
    download leaves a ``.part`` file, which the next call continues. Where GroupLens does not answer, ``ml-100k`` is
    taken from the RecBole wheel on the Python package index (fetched with pip, checked against its sha256, never
    imported or installed). The source and the terms of use are printed to stderr once, after the download.

    Args:
        name: ``ml-100k``, ``ml-1m``, ``ml-20m``, ``ml-25m`` or ``ml-32m``.
        cache_dir: where the data are kept, by default ``$XDG_CACHE_HOME/saerec-fast`` or ``~/.cache/saerec-fast``.
        progress: show a progress bar.

    Returns:
        The folder of the data set, ``cache_dir / name``, for :func:`~saerec_fast.data.readers.read_dataset`. It
        appears only once it is whole.

    Raises:
        ValueError: unknown name.
        DownloadError: no source answered, or an archive is damaged; the message says what to do by hand.
    """
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}; there are {', '.join(NAMES)}")
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    target = cache / name
    if target.is_dir():
        return target
    console = Console(stderr=True, highlight=False)
    cache.mkdir(parents=True, exist_ok=True)
    url = f"{_base_url.rstrip('/')}/{name}.zip"
    try:
        archive = _fetch_archive(url, cache / f"{name}.zip", console, progress)
        _unpack(archive, target)
        archive.unlink()
        source = url
    except _Damaged as error:
        raise DownloadError(_by_hand(name, target, [str(error)])) from error
    except _Unreachable as error:
        failures = [str(error)]
        if name != "ml-100k":
            raise DownloadError(_by_hand(name, target, failures)) from error
        console.print(
            f"{error}; trying the copy in {RECBOLE} on the Python package index", markup=False, soft_wrap=True
        )
        try:
            _from_recbole(target)
        except (_Unreachable, _Damaged) as second:
            raise DownloadError(_by_hand(name, target, [*failures, str(second)])) from second
        source = f"the copy in {RECBOLE} on the Python package index"
    console.print(f"{name}: downloaded from {source} into {target}", markup=False, soft_wrap=True)
    console.print(usage_terms(target), markup=False, soft_wrap=True)
    console.print(NO_REDISTRIBUTION, markup=False, soft_wrap=True)
    return target


def usage_terms(folder: str | os.PathLike[str]) -> str:
    """The section on the usage licence of a data set's README, the whole README where it has no such section.

    Returns:
        A line that says so where there is no README.
    """
    for name in ("README", "README.txt", "README.md"):
        path = Path(folder) / name
        if not path.is_file():
            continue
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        underlined = [
            index
            for index in range(len(lines) - 1)
            if lines[index].strip() and re.match(r"^[=-]{3,}\s*$", lines[index + 1])
        ]
        for index, start in enumerate(underlined):
            if re.search(r"usage licen[cs]e", lines[start], re.IGNORECASE):
                end = underlined[index + 1] if index + 1 < len(underlined) else len(lines)
                return "\n".join(lines[start:end]).strip()
        return "\n".join(lines).strip()
    return "The data set came without a README; see https://grouplens.org/datasets/movielens/ for the terms of use."


def _by_hand(name: str, target: Path, failures: list[str]) -> str:
    reasons = "\n".join(f"  - {failure}" for failure in failures)
    return (
        f"could not download {name}:\n{reasons}\n"
        f"By hand: get {GROUPLENS}/{name}.zip (or any copy of it that you may use), unpack it, and pass the folder"
        f" with --data <folder>, or move it to {target}."
    )


def _fetch_archive(url: str, archive: Path, console: Console, progress: bool) -> Path:
    expected = _published_md5(f"{url}.md5")
    part = archive.with_name(f"{archive.name}.part")
    resumed = part.is_file() and part.stat().st_size > 0
    with _bar(console, archive.name, progress) as report:
        _fetch(url, part, report)
        if resumed and _digest(part, "md5") != expected:
            # The beginning may be of an older archive or of a crash; without it there is no doubt.
            part.unlink()
            _fetch(url, part, report)
    found = _digest(part, "md5")
    if found != expected:
        part.unlink()
        raise _Damaged(f"{url}: the md5 sum is {found}, GroupLens publishes {expected}")
    os.replace(part, archive)
    return archive


def _published_md5(url: str) -> str:
    """The sum out of ``<sum>  <file>`` or ``MD5 (<file>) = <sum>``."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            text = response.read(4096).decode("utf-8", "replace")
    except (OSError, HTTPException) as error:
        raise _Unreachable(f"{url}: {_reason(error)}") from None
    match = re.search(r"\b[0-9a-fA-F]{32}\b", text)
    if match is None:
        raise _Unreachable(f"{url}: the answer holds no md5 sum")
    return match.group().lower()


def _fetch(url: str, part: Path, report: Callable[[int, int | None], None]) -> None:
    """Complete ``part``, continuing what it holds; try again, from where it broke off, while there is progress."""
    failures = 0
    while True:
        before = part.stat().st_size if part.is_file() else 0
        try:
            if _fetch_once(url, part, before, report):
                return
            reason = "the connection broke off"
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and before:
                # Nothing lies beyond what is here; the checksum tells whether it is the archive.
                return
            raise _Unreachable(f"{url}: {_reason(error)}") from None
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            reason = _reason(error)
        after = part.stat().st_size if part.is_file() else 0
        failures = 0 if after > before else failures + 1
        if failures >= ATTEMPTS:
            kept = f"; {after:,} bytes are kept in {part} and the next call continues" if after else ""
            raise _Unreachable(f"{url}: {reason}{kept}")
        if after == 0:
            raise _Unreachable(f"{url}: {reason}")
        time.sleep(0.2 * failures)


def _fetch_once(url: str, part: Path, start: int, report: Callable[[int, int | None], None]) -> bool:
    """One request from byte ``start``; whether all bytes came."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        content_range = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        if response.status != 206 or content_range is None or int(content_range.group(1)) != start:
            start = 0  # a server that does not know ranges sends everything
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() else None
        done = start
        report(done, total)
        with part.open("ab" if start else "wb") as stream:
            while chunk := response.read(CHUNK):
                stream.write(chunk)
                done += len(chunk)
                report(done, total)
    return total is None or done >= total


@contextmanager
def _bar(console: Console, label: str, shown: bool) -> Iterator[Callable[[int, int | None], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not shown) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return f"not reachable ({error.reason})"
    return f"not reachable ({error or type(error).__name__})"


def _digest(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _unpack(archive: Path, target: Path) -> None:
    """Unpack the one folder of ``archive`` as ``target``, all of it or nothing."""
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
        scratch = Path(name)
        try:
            with zipfile.ZipFile(archive) as opened:
                for member in opened.infolist():
                    _check_member(archive, member)
                opened.extractall(scratch)
        except zipfile.BadZipFile as error:
            raise _Damaged(f"{archive}: not a zip archive ({error})") from None
        entries = [entry for entry in scratch.iterdir() if entry.name != "__MACOSX" and not entry.name.startswith(".")]
        _move(entries[0] if len(entries) == 1 and entries[0].is_dir() else scratch, target)


def _check_member(archive: Path, member: zipfile.ZipInfo) -> None:
    """Refuse what would land outside the folder unpacked to; zipfile would quietly put it elsewhere."""
    # On Windows a backslash separates folders and a colon follows a drive; no MovieLens file has either.
    parts = member.filename.replace("\\", "/").split("/")
    outside = parts[0] == "" or ".." in parts or ":" in member.filename
    if outside or stat.S_ISLNK(member.external_attr >> 16):
        raise _Damaged(f"{archive}: refused, the archive wants to write outside its folder ({member.filename!r})")


def _move(folder: Path, target: Path) -> None:
    """Rename ``folder`` to ``target``; whoever was faster wins."""
    try:
        os.rename(folder, target)
    except OSError:
        if not target.is_dir():
            raise
    else:
        target.chmod(0o755)  # temporary folders are private


def _from_recbole(target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
        scratch = Path(name)
        wheel = _fetch_wheel(scratch)
        found = _digest(wheel, "sha256")
        if found != RECBOLE_SHA256:
            raise _Damaged(f"{wheel.name}: the sha256 sum is {found}, expected {RECBOLE_SHA256}")
        folder = scratch / "unpacked"
        folder.mkdir()
        with zipfile.ZipFile(wheel) as opened:
            for file in RECBOLE_FILES:
                with opened.open(f"{RECBOLE_FOLDER}/{file}") as source, (folder / file).open("wb") as stream:
                    shutil.copyfileobj(source, stream)
        (folder / "README").write_text(TERMS, encoding="utf-8")
        _move(folder, target)


def _fetch_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", RECBOLE, "-d", str(folder)]
    options = ["--quiet", "--disable-pip-version-check", "--timeout", str(int(TIMEOUT)), "--retries", "1"]
    try:
        result = subprocess.run(
            [*command, *options], capture_output=True, text=True, errors="replace", timeout=300, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Unreachable(f"pip download {RECBOLE}: {error}") from None
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        said = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise _Unreachable(f"pip download {RECBOLE}: {said[-1].strip() if said else 'no wheel came'}")
    return wheels[0]
