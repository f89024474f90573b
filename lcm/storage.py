"""Files and folders that are complete or absent, whenever a run is killed."""

import contextlib
import os
import re
import shutil

UMASK = os.umask(0)
os.umask(UMASK)  # it can only be read by setting it
PARTIAL = ".partial"  # ends the name of a folder that is still being written, or removed
EXPORT = "export"  # begins the name of the folder in which the results are written before they take their places


def sync_to_disk(path):
    """Flush one file, or the entries of one folder; a file gets the permissions that new files have here.

    safetensors makes files that nobody but their owner can read.
    """
    if os.path.isfile(path):
        os.chmod(path, 0o666 & ~UMASK)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(partial, path):
    """Flush the complete folder or file `partial`, and give it the name `path` in place of what bore it."""
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


def remove_folder(path):
    """Remove a folder so that a half-removed one never bears its name."""
    os.rename(path, path + PARTIAL)
    shutil.rmtree(path + PARTIAL)


def remove_leftovers(output_dir, names):
    """Remove the unfinished folders of a run that was killed; put back one that was just being replaced.

    Only checkpoints, folders called one of `names`, and what `whole_entries` made are ours to touch.
    """
    ours = re.compile(rf"(checkpoint-\d+|{EXPORT}|{'|'.join(map(re.escape, names))})(\.old)?{re.escape(PARTIAL)}")
    for name in os.listdir(output_dir):
        match, path = ours.fullmatch(name), os.path.join(output_dir, name)
        if not os.path.isdir(path):  # all that is ours are folders
            continue
        if match and match[2] and not os.path.exists(os.path.join(output_dir, match[1])):
            os.rename(path, os.path.join(output_dir, match[1]))
        elif match:
            shutil.rmtree(path)


@contextlib.contextmanager
def whole_entries(output_dir):
    """Yield a folder to write into; each file and folder in it moves to `output_dir` if the block ends well."""
    folder = os.path.join(output_dir, EXPORT + PARTIAL)
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    try:
        yield folder
        for name in sorted(os.listdir(folder)):
            publish(os.path.join(folder, name), os.path.join(output_dir, name))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
