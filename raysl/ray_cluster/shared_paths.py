"""Refuse folders of one machine on a cluster whose workers are other machines, before any of them is started."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from raysl.errors import UserError
from raysl.ray_cluster import autoscaler
from raysl.storage import Folder

_MOUNTS = Path("/proc/self/mounts")
# Prefixes of the names of file systems that several machines may share.
_SHARED = (
    *("nfs", "lustre", "ceph", "cifs", "smb", "gpfs", "beegfs", "fuse", "9p", "glusterfs", "weka", "pvfs"),
    *("afs", "ocfs", "gfs"),
)


def refuse_local(paths: Mapping[str, str]) -> None:
    """Refuse paths on a disk of a head that takes no work, because the workers cannot see them.

    Args:
        paths: path or URI by flag, such as {"--run": "runs/1"}.

    Raises:
        UserError: a path is on a disk of this machine.
    """
    capacity = autoscaler.capacity()
    if capacity is None or capacity.head.resources.get("CPU") or not capacity.types:
        return
    for flag, path in paths.items():
        folder = Folder(path)
        if folder.is_local and not _may_be_shared(Path(str(folder)).resolve()):
            raise UserError(
                f"{flag} {path} is on a disk of the head of this cluster, and the workers are other machines, which "
                f"cannot see it. Use a bucket, such as {flag} s3://bucket/folder, or a network file system. No machine "
                "has been started."
            )


def _may_be_shared(path: Path) -> bool:
    """Return True if the file system of a path, which need not exist, is a network file system."""
    try:
        lines = _MOUNTS.read_text().splitlines()
    except OSError:  # not Linux
        return True
    mounts = {Path(line.split()[1].replace("\\040", " ")): line.split()[2] for line in lines}
    kinds = (mounts[parent] for parent in (path, *path.parents) if parent in mounts)
    return next(kinds, "").startswith(_SHARED)
