"""The download: resumed, verified, and unpacked safely."""

from __future__ import annotations

import http.server
import shutil
import threading
import zipfile
from functools import partial
from pathlib import Path

import pytest
from conftest import write_pairs

from isic.download import download_isic
from isic.layout import ISIC_IMAGES, ISIC_MASKS, find_pairs, isic_folders
from runtime.errors import UserError


class _Archives(http.server.SimpleHTTPRequestHandler):
    """Serves files with byte ranges and can be told to hang up half-way."""

    break_at: int | None = None
    ranges: list[str] = []

    def do_GET(self):
        data = (Path(self.directory) / self.path[1:]).read_bytes()
        start = 0
        if "Range" in self.headers:
            self.ranges.append(self.headers["Range"])
            start = int(self.headers["Range"].split("=")[1].rstrip("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : type(self).break_at])
        type(self).break_at = None

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(_Archives, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


def _archive(folder: Path, name: str, root: Path) -> None:
    with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
        for path in sorted((root / name).iterdir()):
            archive.write(path, f"{name}/{path.name}")


def test_download_resumes_verifies_and_unpacks(server, tmp_path):
    folder, url = server
    source = write_pairs(tmp_path / "source", 5)
    archives = [(f"{url}/{name}.zip", name) for name in (ISIC_IMAGES, ISIC_MASKS)]
    for _, name in archives:
        _archive(folder, name, source)
    _Archives.break_at = 1000
    _Archives.ranges = []
    with pytest.raises(UserError, match="run the same command again to continue"):
        download_isic(tmp_path / "target", archives)
    assert not (tmp_path / "target" / ISIC_IMAGES).exists()
    download_isic(tmp_path / "target", archives)
    assert _Archives.ranges == ["bytes=1000-"]
    assert len(find_pairs(*isic_folders(tmp_path / "target"))) == 5
    shutil.rmtree(folder)  # everything is there: nothing is fetched again
    folder.mkdir()
    download_isic(tmp_path / "target", archives)


def test_download_refuses_paths_outside_the_folder(server, tmp_path):
    folder, url = server
    with zipfile.ZipFile(folder / "evil.zip", "w") as archive:
        archive.writestr("../escaped.txt", "x")
    with pytest.raises(UserError, match="unsafe path '../escaped.txt'"):
        download_isic(tmp_path / "target", [(f"{url}/evil.zip", "evil")])
    assert not (tmp_path / "escaped.txt").exists()


def test_download_of_a_broken_archive_and_without_a_server(server, tmp_path):
    folder, url = server
    (folder / "bad.zip").write_bytes(b"PK not a zip")
    with pytest.raises(UserError, match="bad.zip is broken"):
        download_isic(tmp_path / "target", [(f"{url}/bad.zip", "bad")])
    with pytest.raises(UserError, match="cannot download"):
        download_isic(tmp_path / "target", [("http://127.0.0.1:9/none.zip", "none")])
