"""Mount a folder a second time, without some of what a local disk can do, as network file systems:
python tests/limited_fs.py FOLDER MOUNT --locks ENOLCK --links EPERM --pause 0.02 --read-only. Each
option is one thing that it lacks. It ends when it is unmounted; needs mfusepy and libfuse"""

import argparse
import errno
import os
import time

from mfusepy import FUSE, Operations

TIMES = ("st_atime", "st_mtime", "st_ctime")
FIELDS = ("st_ino", "st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_blocks")


class Limited(Operations):
    "A folder; what is no method here, the kernel does itself or refuses"

    use_ns = True

    def __init__(self, top: str, links: str, pause: float):
        self.top, self.links, self.pause = top, links, pause

    def real(self, path):
        return self.top + path

    def getattr(self, path, fh=None):
        found = os.fstat(fh) if fh is not None else os.lstat(self.real(path))
        times = {k: getattr(found, f"{k}_ns") for k in TIMES}
        return {k: getattr(found, k) for k in FIELDS} | times

    def statfs(self, path):
        found = os.statvfs(self.real(path))
        return {k: getattr(found, k) for k in dir(found) if k.startswith("f_")}

    def access(self, path, amode):
        if not os.access(self.real(path), amode):
            raise OSError(errno.EACCES, path)

    def readdir(self, path, fh):
        return [".", "..", *os.listdir(self.real(path))]

    def create(self, path, mode, flags):
        time.sleep(self.pause)
        return os.open(self.real(path), flags | os.O_CREAT, mode)

    def open(self, path, flags):
        return os.open(self.real(path), flags)

    def read(self, path, size, offset, fh):
        return os.pread(fh, size, offset)

    def write(self, path, data, offset, fh):
        return os.pwrite(fh, data, offset)

    def truncate(self, path, length, fh=None):
        os.truncate(self.real(path), length)

    def fsync(self, path, datasync, fh):
        os.fsync(fh)

    def release(self, path, fh):
        os.close(fh)

    def mkdir(self, path, mode):
        os.mkdir(self.real(path), mode)

    def rmdir(self, path):
        os.rmdir(self.real(path))

    def unlink(self, path):
        os.unlink(self.real(path))

    def rename(self, old, new):
        os.rename(self.real(old), self.real(new))

    def symlink(self, target, source):
        os.symlink(source, self.real(target))

    def readlink(self, path):
        return os.readlink(self.real(path))

    def link(self, target, source):
        if self.links:
            raise OSError(getattr(errno, self.links), target)
        os.link(self.real(source), self.real(target))

    def chmod(self, path, mode):
        os.chmod(self.real(path), mode)

    def chown(self, path, uid, gid):
        os.chown(self.real(path), uid, gid)

    def utimens(self, path, times=None):
        os.utime(self.real(path), ns=tuple(map(int, times)) if times else None)


def refuse(name: str):
    "A method that fails with an error, such as ENOLCK"

    def method(self, path, *args):
        raise OSError(getattr(errno, name), path)

    return method


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("folder")
    p.add_argument("mount")
    p.add_argument("--locks", default="", metavar="ERROR", help="of flock and fcntl")
    p.add_argument("--links", default="", metavar="ERROR", help="of hard links")
    p.add_argument("--read-only", action="store_true")
    p.add_argument("--pause", type=float, default=0.0, help="seconds to create a file")
    a = p.parse_args()
    methods = {k: refuse(a.locks) for k in ("lock", "flock")} if a.locks else {}
    kind = type("LimitedFS", (Limited,), methods)
    FUSE(
        kind(a.folder, a.links, a.pause),
        a.mount,
        foreground=True,
        subtype="limited",
        ro=a.read_only,
    )


if __name__ == "__main__":
    main()
