"""
Runs a script as on a system that lacks what only Unix, or only Linux, has.

    python tests/other_system.py SCRIPT ARGUMENTS...

It runs on Linux, and hides what others lack: modules, functions and signals that Windows does not
have, /proc, and the name of the system. Processes start as on Windows and on macOS: afresh, with
"spawn". And a file that is open, or mapped into memory, can be neither replaced nor removed, as on
Windows.
"""

import builtins
import ctypes
import errno
import io
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

# Libraries come first: many have a form for each system, and choose it when they are imported.
import matplotlib.pyplot  # noqa: F401  (imported for what it does on its first import)
import torch._dynamo  # noqa: F401
from torch.utils.data import DataLoader  # noqa: F401

MODULES = (
    *("crypt", "fcntl", "grp", "nis", "posix", "pty", "pwd", "resource", "spwd", "syslog"),
    *("termios", "tty"),
)
FUNCTIONS = (
    *("chown", "chroot", "fchmod", "fchown", "fork", "forkpty", "getegid", "geteuid", "getgid"),
    *("getgroups", "getloadavg", "getpgid", "getpgrp", "getpriority", "getresuid", "getsid"),
    *("getuid", "initgroups", "killpg", "lchown", "lockf", "major", "makedev", "mkfifo"),
    *("mknod", "nice", "openpty", "pathconf", "pread", "preadv", "pwrite", "sched_getaffinity"),
    *("sched_setaffinity", "sendfile", "setegid", "seteuid", "setgid", "setgroups", "setpgid"),
    *("setpriority", "setsid", "setuid", "statvfs", "fstatvfs", "sync", "sysconf", "tcgetpgrp"),
    *("ttyname", "uname", "wait", "wait3", "wait4", "waitid"),
)
# SIGCHLD stays: PyTorch's loader of data looks for it on all systems but "win32".
SIGNALS = (
    *("SIGALRM", "SIGCONT", "SIGHUP", "SIGIO", "SIGKILL", "SIGPIPE", "SIGPROF", "SIGQUIT"),
    *("SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGUSR1", "SIGUSR2", "SIGWINCH", "alarm"),
    *("getitimer", "pause", "pthread_kill", "setitimer", "siginterrupt", "sigpending"),
    *("sigtimedwait", "sigwait", "sigwaitinfo"),
)

open_file = io.open
load_library = ctypes.CDLL.__init__


def hide() -> None:
    """Take away what Windows does not have."""
    for name in MODULES:
        sys.modules[name] = None  # importing it raises ImportError
    for module, names in ((os, FUNCTIONS), (signal, SIGNALS)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    sys.platform = os.name = "another"
    io.open = builtins.open = open_without_proc
    ctypes.CDLL.__init__ = load_named_library
    multiprocessing.set_start_method("spawn")
    for name in ("replace", "rename", "remove", "unlink", "link", "symlink"):
        setattr(os, name, guarded(getattr(os, name)))


def load_named_library(self, name, *args, **kwargs):
    """ctypes.CDLL, where None does not stand for the program itself."""
    if name is None:
        raise TypeError("a library must have a name")
    load_library(self, name, *args, **kwargs)


def open_without_proc(file, *args, **kwargs):
    """open(), where there is no /proc."""
    if isinstance(file, (str, os.PathLike)) and os.fspath(file).startswith(("/proc", "/sys")):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
    return open_file(file, *args, **kwargs)


def guarded(function):
    """The function of os, which refuses a file that is in use."""

    def refuse_files_in_use(*paths, **kwargs):
        for path in paths:
            if os.path.exists(path) and os.path.realpath(path) in files_in_use():
                raise PermissionError(errno.EACCES, "the file is in use", str(path))
        return function(*paths, **kwargs)

    return refuse_files_in_use


def files_in_use() -> set[str]:
    """The paths of all files that this process has open or mapped."""
    with open_file("/proc/self/maps", encoding="utf-8") as maps:
        mapped = {line.split(maxsplit=5)[-1].strip() for line in maps}
    opened = set()
    for number in os.listdir("/proc/self/fd"):
        link = Path("/proc/self/fd", number)
        opened.add(os.path.realpath(link))
    return mapped | opened


if __name__ == "__main__":
    hide()
    script = sys.argv[1]
    del sys.argv[0]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
