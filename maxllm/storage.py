"""Paths that may lie in a bucket, `gs://…` or `s3://…`: one type for them all, and what buckets do otherwise.

A local path is a `pathlib.Path`. One in a bucket is etils' `epath.Path`, which has the same methods; its
client library is an extra of the package and imported when the first such path is made. A bucket knows whole
objects only: writing one is atomic, and there are no empty folders and no renames.
"""

from __future__ import annotations

import importlib.util
import os
import posixpath
import shutil
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from maxllm.errors import UserError

CLIENTS = {"gs": ("gcs", "gcsfs"), "s3": ("s3", "s3fs")}
"""{scheme: (extra of the package, module of its client)}."""

REMEDIES = {
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS, for an "
    "account that may list, read, write and delete objects there",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), or AWS_PROFILE, for a "
    "user that may list, read, write and delete objects there",
}

MISSING = (
    *("DefaultCredentialsError", "Anonymous caller", "NoCredentialsError", "PartialCredentialsError"),
    "Unable to locate credentials",
)
EXPIRED = (
    *("RefreshError", "ExpiredToken", "TokenRefreshRequired", "expired", "InvalidAccessKeyId"),
    *("UNAUTHENTICATED", "Invalid Credentials", "401", "SignatureDoesNotMatch"),
)
FORBIDDEN = ("PERMISSION_DENIED", "Forbidden", "AccessDenied", "Access Denied", "403", "PermissionError")
"""What the libraries' errors say where credentials are the trouble."""


def scheme_of(path: str | os.PathLike[str]) -> str | None:
    """`gs` or `s3` or whatever stands before ://; None for a local path."""
    name = os.fspath(path)
    return name.partition("://")[0] if "://" in name else None


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path lies in a bucket."""
    return scheme_of(path) is not None


def path_of(path: str | os.PathLike[str]) -> Path:
    """A path of the one type, from a setting.

    Raises:
      UserError: it lies in storage of another kind, or the client of that storage is not installed.
    """
    scheme = scheme_of(path)
    if scheme is None:
        return Path(path)
    if scheme not in CLIENTS:
        raise UserError(f"{path} is neither a local path nor in a bucket (gs://BUCKET/…, s3://BUCKET/…)")
    client(scheme)
    from etils import epath

    return epath.Path(path)


@cache
def client(scheme: str) -> None:
    """Makes the client library of a kind of bucket ready.

    Raises:
      UserError: it is not installed.
    """
    extra, module = CLIENTS[scheme]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"paths in {scheme}:// need {module}: pip install 'maxllm[{extra}]'")
    # Without this, etils would take TensorFlow for buckets wherever that happens to be installed.
    os.environ["EPATH_USE_TF"] = "false"
    import fsspec

    # TensorStore writes objects, too, of which a cache of listings would not know.
    for name in (scheme, extra):
        fsspec.config.conf.setdefault(name, {})["use_listings_cache"] = False


def filesystem(path: Path) -> Any:
    """The fsspec file system of a path in a bucket."""
    import fsspec

    return fsspec.filesystem(scheme_of(path))


def absolute(path: Path) -> Path:
    """The path from the root; one in a bucket always begins there."""
    return path if is_remote(path) else path.absolute()


def resolved(path: Path) -> Path:
    """The path from the root, links followed and .. taken out."""
    return path_of(normal(str(path))) if is_remote(path) else path.resolve()


def normal(name: str) -> str:
    """A name without . and .. in it; the scheme's two slashes stay."""
    scheme, mark, rest = name.rpartition("://")
    return f"{scheme}{mark}{posixpath.normpath(rest)}" if mark else os.path.normpath(name)


def way(to: Path, start: Path) -> str:
    """The relative path from one folder to another; the whole path where they lie in different storage."""
    if scheme_of(to) != scheme_of(start):
        return str(to)
    return os.path.relpath(bare(to), bare(start))


def along(start: Path, way: str) -> Path:
    """Where a path from `way` leads to."""
    return path_of(way if is_remote(way) else normal(f"{start}/{way}") if is_remote(start) else start / way)


def bare(path: Path) -> str:
    """A path without its scheme."""
    return str(path).partition("://")[2] if is_remote(path) else str(path)


def children(folder: Path) -> list[Path]:
    """What lies in a folder, in no order; nothing where there is no folder."""
    if not is_remote(folder):
        return list(folder.iterdir()) if folder.is_dir() else []
    # Not is_dir(): it takes a bucket that refuses the question for one without the folder.
    try:
        names = filesystem(folder).ls(str(folder), detail=False)
    except FileNotFoundError:
        return []
    return [folder / name.rstrip("/").rpartition("/")[2] for name in names]


def files_below(folder: Path) -> Iterator[Path]:
    """All files in a folder and the folders in it."""
    if is_remote(folder):
        scheme = scheme_of(folder)
        return (path_of(f"{scheme}://{name}") for name in filesystem(folder).find(str(folder)))
    return (file for file in folder.rglob("*") if file.is_file())


def name_below(file: Path, folder: Path) -> str:
    """The path of a file below a folder, with slashes."""
    return file.relative_to(folder).as_posix()


def size_of(file: Path) -> int:
    """Bytes of a file."""
    found: Any = file.stat()
    return found.length if is_remote(file) else found.st_size


def written_at(file: Path) -> float:
    """When a file was last written, in seconds since the epoch."""
    found: Any = file.stat()
    return found.mtime if is_remote(file) else found.st_mtime


def written_at_ns(file: Path) -> int:
    """When a file was last written, in nanoseconds since the epoch; whole seconds in a bucket."""
    found: Any = file.stat()
    return found.mtime * 10**9 if is_remote(file) else found.st_mtime_ns


def create(file: Path, content: bytes) -> None:
    """Writes a file that is not there yet; of several processes that do so at a time, one succeeds.

    Raises:
      FileExistsError: it is there.
    """
    if is_remote(file):
        filesystem(file).pipe_file(str(file), content, mode="create")
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("xb") as stream:
        stream.write(content)


def copy_in(file: Path, to: Path) -> None:
    """Copies a file of this disk to a bucket."""
    filesystem(to).put_file(str(file), str(to))


def remove_folder(folder: Path) -> None:
    """Removes a folder and all in it, as far as that can be done."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.is_dir():
        filesystem(folder).rm(str(folder), recursive=True)


def move_folder(folder: Path, to: Path) -> None:
    """Gives a folder another name; in a bucket one object after another."""
    if is_remote(folder):
        files = filesystem(folder)
        names = files.find(str(folder))  # each by its name, for s3fs would ask for folders, too
        prefix = len(bare(folder))
        files.copy(names, [f"{bare(to)}{name[prefix:]}" for name in names])
        files.rm(names)
    else:
        folder.rename(to)


def kvstore(path: Path) -> dict[str, Any]:
    """TensorStore's description of the place of a path."""
    if not is_remote(path):
        return {"driver": "file", "path": str(path)}
    bucket, _, name = bare(path).partition("/")
    if scheme_of(path) == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": name}
    spec = {"driver": "s3", "bucket": bucket, "path": name}
    # TensorStore reads none of these by itself where the service is not Amazon's own.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return spec | ({"endpoint": endpoint} if endpoint else {}) | ({"aws_region": region} if region else {})


def refusal(error: BaseException, path: Path | str | None = None) -> str | None:
    """A sentence for an error that tells of a bucket's credentials; None for another one.

    Args:
      error: what was raised, perhaps from something else.
      path: what was to be read or written; None where that is not known.
    """
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    scheme = scheme_of(path) if path is not None else scheme_in(chain)
    if scheme not in CLIENTS:
        return None
    told = " ".join(f"{type(each).__name__} {each}" for each in chain)
    for signs, what in (
        (MISSING, "there are no credentials for it"),
        (EXPIRED, "its credentials have expired or are not valid"),
        (FORBIDDEN, "the account that is used lacks the permission"),
    ):
        if any(sign in told for sign in signs):
            where = path if path is not None else f"a bucket of {scheme}://"
            return f"{where} cannot be reached, {what}: {REMEDIES[scheme]}"
    return None


def scheme_in(chain: Iterable[BaseException]) -> str | None:
    """The kind of bucket whose client raised one of some errors, which are often Python's own."""
    for error in chain:
        modules = {frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)}
        packages = {module.partition(".")[0] for module in modules}
        for scheme, (_, client_module) in CLIENTS.items():
            if client_module in packages:
                return scheme
    return None


@contextmanager
def reachable(path: Path) -> Iterator[None]:
    """Turns what a client raises for want of credentials into a sentence with the path in it.

    Raises:
      UserError: instead of such an error.
    """
    try:
        yield
    except Exception as error:
        if not is_remote(path) or (sentence := refusal(error, path)) is None:
            raise
        raise UserError(sentence) from error
