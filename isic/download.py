"""The official ISIC archives: fetched with resumption, verified, and unpacked safely."""

from __future__ import annotations

import errno
import http.client
import urllib.error
import urllib.request
import zipfile
from collections.abc import Sequence
from pathlib import Path

from torchvision.datasets.utils import check_integrity, extract_archive

from isic.layout import ISIC_IMAGES, ISIC_MASKS
from runtime.errors import UserError, one_line
from runtime.files import check_space, disk, make_folder, publish, remove, remove_tree
from runtime.lock import FolderLock
from runtime.progress import progress_bar

ISIC_ARCHIVES = (
    ("https://isic-challenge-data.s3.amazonaws.com/2018/ISIC2018_Task1-2_Training_Input.zip", ISIC_IMAGES),
    ("https://isic-challenge-data.s3.amazonaws.com/2018/ISIC2018_Task1_Training_GroundTruth.zip", ISIC_MASKS),
)
#: A zip file that claims to grow more than this is a bomb; photographs hardly shrink, masks tenfold to fiftyfold.
MAX_EXPANSION, MAX_MEMBERS = 200, 200_000


def download_isic(root: Path, archives: Sequence[tuple[str, str]] = ISIC_ARCHIVES) -> None:
    """Fetch and unpack the official training images and masks under ``root``.

    A download that stopped half-way goes on where it stopped (HTTP range
    requests). An archive is verified by its announced length and by the
    checksum of every member, and unpacked only if every member stays inside
    ``root``. A part that is already unpacked is left alone.

    Raises:
        UserError: the server cannot be reached, or an archive is broken or unsafe.
    """
    root = Path(root)
    missing = [(url, folder) for url, folder in archives if not (root / folder).is_dir()]
    if not missing:
        return
    with FolderLock(root, "give --data a folder that is complete"):  # two at once would mix their bytes in one file
        for url, folder in missing:
            archive = root / url.rsplit("/", 1)[1]
            _fetch(url, archive)
            _unpack(archive, root, folder)


def _fetch(url: str, path: Path) -> None:
    """Download to ``path``, by way of a ``.part`` file that a later call continues."""
    part = path.with_name(path.name + ".part")
    if check_integrity(str(path)):
        return
    try:
        make_folder(path.parent)
        done = part.stat().st_size if part.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
        try:
            response = urllib.request.urlopen(request, timeout=60)
        except urllib.error.HTTPError as error:
            if error.code != 416:  # the part is already all there is
                raise
            publish(part, path)
            return
        with response:
            resumed = response.status == 206
            start = done if resumed else 0  # a server without ranges sends it all again
            total = start + int(response.headers.get("Content-Length", 0))
            with disk.open(part) as stream, progress_bar(
                path.name, total or None, "B", initial=start, unit_scale=True
            ) as bar:
                disk.truncate(stream, start)
                for block in iter(lambda: response.read(1 << 20), b""):
                    disk.write_at(stream, start, block)
                    start += len(block)
                    bar.update(len(block))
        if total and part.stat().st_size != total:
            raise UserError(f"the download of {url} stopped early; run the same command again to continue it")
        publish(part, path)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {url} ({one_line(error)}); run the same command again to continue, "
            f"or put the unpacked archive into {path.parent}"
        ) from error


def _unpack(archive: Path, root: Path, folder: str) -> None:
    """Unpack a zip archive beside its place and move it there when it is whole."""
    try:
        with zipfile.ZipFile(archive) as content:
            members = content.infolist()
            for member in members:
                target = (root / member.filename).resolve()
                if root.resolve() not in target.parents:
                    raise UserError(f"{archive} holds the unsafe path {member.filename!r}; delete it and download again")
            size = sum(member.file_size for member in members)  # no member can grow beyond what it declares
            if len(members) > MAX_MEMBERS or size > MAX_EXPANSION * archive.stat().st_size + 2**20:
                raise UserError(
                    f"{archive} would grow from {archive.stat().st_size} bytes to {size} in {len(members)} files; "
                    "that is no archive of pictures: delete it and download again"
                )
            check_space(root, size, "make room")
        staging = root / f".{folder}.partial"
        remove_tree(staging)
        extract_archive(str(archive), str(staging))  # checks every member's CRC as it reads
        inner = staging / folder
        if not inner.is_dir():
            raise UserError(f"{archive} does not hold the folder {folder}; delete it and download again")
        publish(inner, root / folder)
        remove_tree(staging)
        remove(archive)
    except UserError:
        raise
    except Exception as error:  # a damaged archive may be encrypted, packed in an unknown way, or anything else
        # EINVAL: some versions of zipfile go to where a damaged archive points, even if that is before its beginning
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise UserError(f"cannot unpack {archive}: {error.strerror or error}; make room and run again") from error
        raise UserError(f"{archive} is broken ({one_line(error)}); delete it and run the same command again") from error
