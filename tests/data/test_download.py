import hashlib
import io
import re
import socket
import subprocess
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from saerec_fast.data import DownloadError, download, read_dataset
from saerec_fast.data import download as package_attribute
from saerec_fast.data.download import NO_REDISTRIBUTION, RECBOLE_FOLDER, _Unreachable, default_cache_dir, usage_terms

README = """\
SUMMARY & USAGE LICENSE
=======================

For research only.

CITATION
========

A paper.
"""


def archive(members=None):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as opened:
        for name, text in (members or {}).items():
            opened.writestr(name, text)
        if members is None:
            opened.writestr("ml-1m/README", README)
            opened.writestr("ml-1m/movies.dat", "1::A (1990)::Drama\n" + "2::B (1991)::Drama\n")
            opened.writestr("ml-1m/ratings.dat", "1::1::3::5\n1::2::3::6\n" * 50_000)
    return buffer.getvalue()


class Source:
    """A server with byte ranges; ``breaks`` is after how many bytes each request in turn breaks off."""

    def __init__(self, content, name="ml-1m"):
        self.files = {
            f"/{name}.zip": content,
            f"/{name}.zip.md5": f"MD5 ({name}.zip) = {hashlib.md5(content).hexdigest()}\n".encode(),
        }
        self.breaks = []
        self.ranges = True
        self.requests = []
        source = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                source.requests.append((self.path, asked))
                body = source.files.get(self.path)
                if body is None:
                    self.send_error(404)
                    return
                start = int(re.fullmatch(r"bytes=(\d+)-", asked).group(1)) if asked and source.ranges else 0
                if start >= len(body):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                cut = source.breaks.pop(0) if source.breaks and self.path.endswith(".zip") else None
                self.wfile.write(body[start:] if cut is None else body[start : start + cut])

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def serve():
    sources = []

    def start(*arguments, **keywords):
        sources.append(Source(*arguments, **keywords))
        return sources[-1]

    yield start
    for source in sources:
        source.close()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def nowhere():
    """An address that refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def get(source, tmp_path, name="ml-1m"):
    return download(name, cache_dir=tmp_path / "cache", progress=False, _base_url=getattr(source, "url", source))


def zip_requests(source):
    return [asked for path, asked in source.requests if path.endswith(".zip")]


def test_downloads_checks_unpacks_and_shows_the_terms(serve, tmp_path, capsys):
    source = serve(archive())
    folder = get(source, tmp_path)
    assert folder == tmp_path / "cache" / "ml-1m"
    data = read_dataset(folder)
    assert (data.name, data.n_interactions) == ("ml-1m", 100_000)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "For research only." in shown.err
    assert "A paper." not in shown.err
    assert NO_REDISTRIBUTION in shown.err
    assert f"downloaded from {source.url}/ml-1m.zip" in shown.err
    assert [path.name for path in folder.parent.iterdir()] == ["ml-1m"]
    count = len(source.requests)
    assert get(source, tmp_path) == folder
    assert len(source.requests) == count
    assert capsys.readouterr().err == ""


def test_the_progress_bar(serve, tmp_path, capsys):
    source = serve(archive())
    download("ml-1m", cache_dir=tmp_path, _base_url=source.url)
    assert "ml-1m.zip" in capsys.readouterr().err


def test_a_broken_connection_is_taken_up_again(serve, tmp_path):
    source = serve(archive())
    source.breaks = [400_000, 300_000]
    get(source, tmp_path)
    assert zip_requests(source) == [None, "bytes=400000-", "bytes=700000-"]


def test_the_next_call_continues(serve, tmp_path):
    content = archive()
    source = serve(content)
    source.breaks = [500_000] + [0] * 3
    with pytest.raises(DownloadError, match=r"500,000 bytes are kept in .*ml-1m\.zip\.part"):
        get(source, tmp_path)
    assert not (tmp_path / "cache" / "ml-1m").exists()
    source.requests.clear()
    get(source, tmp_path)
    assert zip_requests(source) == ["bytes=500000-"]


def test_a_complete_part_needs_no_bytes(serve, tmp_path):
    content = archive()
    source = serve(content)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "ml-1m.zip.part").write_bytes(content)
    get(source, tmp_path)
    assert zip_requests(source) == [f"bytes={len(content)}-"]


def test_a_part_of_something_else_is_dropped(serve, tmp_path):
    source = serve(archive())
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "ml-1m.zip.part").write_bytes(b"x" * 1000)
    get(source, tmp_path)
    assert zip_requests(source) == ["bytes=1000-", None]


def test_a_server_without_ranges(serve, tmp_path):
    source = serve(archive())
    source.ranges = False
    source.breaks = [1000]
    get(source, tmp_path)
    assert zip_requests(source) == [None, "bytes=1000-"]


def test_a_wrong_checksum(serve, tmp_path):
    source = serve(archive())
    source.files["/ml-1m.zip.md5"] = b"0" * 32 + b"  ml-1m.zip\n"
    with pytest.raises(DownloadError, match=r"the md5 sum is [0-9a-f]{32}, GroupLens publishes 0{32}"):
        get(source, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("text", [None, b"<html>"])
def test_no_checksum_no_data(serve, tmp_path, text):
    source = serve(archive())
    del source.files["/ml-1m.zip.md5"]
    if text:
        source.files["/ml-1m.zip.md5"] = text
    with pytest.raises(DownloadError, match=r"the server answers 404|holds no md5 sum"):
        get(source, tmp_path)
    assert zip_requests(source) == []


@pytest.mark.parametrize("name", ["../evil", "ml-1m/../../evil", "/evil", "ml-1m\\..\\..\\evil", "C:/evil"])
def test_archives_cannot_write_elsewhere(serve, tmp_path, name):
    source = serve(archive({"ml-1m/ratings.dat": "", name: "evil"}))
    with pytest.raises(DownloadError, match="wants to write outside its folder"):
        get(source, tmp_path)
    assert not list(tmp_path.rglob("*evil*"))
    assert not (tmp_path / "cache" / "ml-1m").exists()


def test_archives_cannot_hold_links(serve, tmp_path):
    link = zipfile.ZipInfo("ml-1m/ratings.dat")
    link.external_attr = 0o120777 << 16
    source = serve(archive({link: "/etc/passwd"}))
    with pytest.raises(DownloadError, match="wants to write outside"):
        get(source, tmp_path)


def test_not_an_archive(serve, tmp_path):
    with pytest.raises(DownloadError, match="not a zip archive"):
        get(serve(b"hello"), tmp_path)


def test_unreachable_says_what_to_do(nowhere, tmp_path):
    with pytest.raises(DownloadError) as caught:
        get(nowhere, tmp_path)
    message = str(caught.value)
    assert "not reachable" in message
    assert "https://files.grouplens.org/datasets/movielens/ml-1m.zip" in message
    assert "--data <folder>" in message
    assert str(tmp_path / "cache" / "ml-1m") in message


def test_unknown_names(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'ml-2m'; there are ml-100k, ml-1m"):
        download("ml-2m", cache_dir=tmp_path)


def fake_wheel(folder):
    path = folder / "recbole-1.2.1-py3-none-any.whl"
    path.write_bytes(
        archive(
            {
                "recbole/__init__.py": "raise RuntimeError('imported')",
                f"{RECBOLE_FOLDER}/ml-100k.inter": "user_id:token\titem_id:token\ttimestamp:float\n1\t1\t5\n",
                f"{RECBOLE_FOLDER}/ml-100k.item": "item_id:token\tclass:token_seq\n1\tDrama\n",
            }
        )
    )
    return path


@pytest.fixture
def module():
    """The module; the package's attribute of the same name is the function."""
    import importlib

    assert callable(package_attribute)
    return importlib.import_module("saerec_fast.data.download")


def test_fall_back_to_the_copy_in_recbole(nowhere, tmp_path, monkeypatch, capsys, module):
    wheel = fake_wheel(tmp_path)
    monkeypatch.setattr(module, "RECBOLE_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(module, "_fetch_wheel", fake_wheel)
    folder = get(nowhere, tmp_path, "ml-100k")
    assert sorted(path.name for path in folder.iterdir()) == ["README", "ml-100k.inter", "ml-100k.item"]
    data = read_dataset(folder)
    assert (data.name, data.n_interactions) == ("ml-100k", 1)
    shown = capsys.readouterr().err
    assert "trying the copy in recbole==1.2.1" in shown
    assert "Do not redistribute" in shown
    assert [path.name for path in folder.parent.iterdir()] == ["ml-100k"]


def test_a_changed_wheel_is_refused(nowhere, tmp_path, monkeypatch, module):
    monkeypatch.setattr(module, "_fetch_wheel", fake_wheel)
    with pytest.raises(DownloadError, match=r"not reachable(.|\n)*the sha256 sum is [0-9a-f]{64}, expected 9c9948"):
        get(nowhere, tmp_path, "ml-100k")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_source_at_all(nowhere, tmp_path, monkeypatch, module):
    def failing(command, **keywords):
        assert command[1:7] == ["-m", "pip", "download", "--no-deps", "recbole==1.2.1", "-d"]
        return subprocess.CompletedProcess(command, 1, "", "WARNING: slow\nERROR: No matching distribution found\n")

    monkeypatch.setattr(module.subprocess, "run", failing)
    with pytest.raises(DownloadError, match=r"not reachable(.|\n)*No matching distribution found(.|\n)*By hand"):
        get(nowhere, tmp_path, "ml-100k")


def test_a_damaged_archive_does_not_fall_back(serve, tmp_path):
    source = serve(archive(), name="ml-100k")
    source.files["/ml-100k.zip.md5"] = b"0" * 32
    with pytest.raises(DownloadError, match="the md5 sum is"):
        get(source, tmp_path, "ml-100k")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "saerec-fast"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "saerec-fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "saerec-fast"


def test_usage_terms(tmp_path):
    assert "https://grouplens.org" in usage_terms(tmp_path)
    (tmp_path / "README.txt").write_text("Summary\n=====\na\n\nUsage License\n-----\nterms\n\nMore\n----\nb\n")
    assert usage_terms(tmp_path) == "Usage License\n-----\nterms"
    (tmp_path / "README").write_text("Just this.\n")
    assert usage_terms(tmp_path) == "Just this."


def test_the_real_copy_in_recbole(tmp_path, nowhere, module):
    """The default data set as everybody without access to GroupLens gets it."""
    try:
        module._from_recbole(tmp_path / "ml-100k")
    except _Unreachable as error:
        pytest.skip(f"the Python package index is not reachable: {error}")
    data = read_dataset(tmp_path / "ml-100k")
    assert (data.n_users, data.n_items, data.n_interactions) == (943, 1682, 100_000)
    assert data.item_table.titles[0] == "Toy Story (1995)"
    assert len(data.item_table.attribute_names) == 18
    assert {"Children's", "Film-Noir", "Sci-Fi"} <= set(data.item_table.attribute_names)
    assert data.timestamps is not None
