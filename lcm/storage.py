"""Files and folders that are either complete or absent, even if a run is killed."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable, Iterator

UMASK = os.umask(0)
os.umask(UMASK)  # the umask can only be read by setting it
PARTIAL = ".partial"  # the suffix of a folder that is still being written or removed
EXPORT = "export"  # EXPORT + PARTIAL is the folder in which results are written before they are moved


def sync_to_disk(path: str) -> None:
    """Flush one file, or the entries of one folder, to disk; a file gets the default permissions of new files.

    safetensors creates files that only their owner can read.
    """
    if os.path.isfile(path):
        os.chmod(path, 0o666 & ~UMASK)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial: str, path: str) -> None:
    """Flush `partial`, a file or folder, to disk, then rename it to `path`, replacing what is there."""
    for parent, _, names in os.walk(partial):
        for name in (*names, ""):
            sync_to_disk(os.path.join(parent, name))
    if os.path.isfile(partial):
        sync_to_disk(partial)
    replaced = path + ".old" + PARTIAL
    shutil.rmtree(replaced, ignore_errors=True)
    if os.path.isdir(path):
        os.rename(path, replaced)
    os.replace(partial, path)
    sync_to_disk(os.path.dirname(path) or ".")
    shutil.rmtree(replaced, ignore_errors=True)


def remove_folder(path: str) -> None:
    """Remove a folder; it is renamed first, so that a half-removed folder never has this name."""
    os.rename(path, path + PARTIAL)
    shutil.rmtree(path + PARTIAL)


def remove_leftovers(output_dir: str, names: Iterable[str]) -> None:
    """Remove the unfinished folders of a run that was killed; restore a folder that was being replaced.

    Touches only checkpoints, folders named in `names`, and the folders of `whole_entries`.
    """
    ours = re.compile(rf"(checkpoint-\d+|{EXPORT}|{'|'.join(map(re.escape, names))})(\.old)?{re.escape(PARTIAL)}")
    for name in os.listdir(output_dir):
        match, path = ours.fullmatch(name), os.path.join(output_dir, name)
        if not os.path.isdir(path):  # a training script leaves only folders
            continue
        if match and match[2] and not os.path.exists(os.path.join(output_dir, match[1])):
            os.rename(path, os.path.join(output_dir, match[1]))
        elif match:
            shutil.rmtree(path)


@contextlib.contextmanager
def whole_entries(output_dir: str) -> Iterator[str]:
    """Yield a folder to write into; if the block ends without an error, its files and folders move to `output_dir`."""
    folder = os.path.join(output_dir, EXPORT + PARTIAL)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    try:
        yield folder
        for name in sorted(os.listdir(folder)):
            publish(os.path.join(folder, name), os.path.join(output_dir, name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
