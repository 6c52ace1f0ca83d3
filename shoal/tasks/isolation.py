"""What a process gives up before it runs code that a model wrote. Linux, through ctypes; runs inside the cell.

    namespaces   user, pid, net, mount, ipc and uts: no other process, network or mount is to be seen
    root         a small tmpfs with read-only binds of the interpreter and its libraries: no other file exists
    landlock     the same bounds on files once more, by path; no TCP, no signals to the outside
    rlimits      processor seconds, address space, file size, open files, no core dumps
    seccomp      the system calls that single-process Python needs and no others: no new processes, sockets, mounts,
                 keys, tracing or tuning; the kernel's newer doors are shut because nobody opened them

Each is tried by itself, and `isolate` says which held. All but the limits are one-way. Calls by number are those of
x86-64 and of AArch64; on other machines seccomp is not to be had, and so no sandbox.
"""

import ctypes
import errno
import os
import resource
import struct
from contextlib import suppress

LIBC = ctypes.CDLL(None, use_errno=True)
ROOM = "/room"  # the only folder that the code may write in
DISK = 16 * 2**20  # bytes of it, and of any file
OPEN_FILES = 64
THREADS = 64

SHARED_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MS_RELATIME, ST_RELATIME, MNT_DETACH = 1 << 21, 4096, 2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 38, 22, 2
CAPABILITIES_V3 = 0x20080522

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column below, AUDIT_ARCH
ALLOWED = {  # by name: its number on x86-64, on AArch64
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "lseek": (8, 62), "close": (3, 57), "open": (2, None), "openat": (257, 56),
    "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None),
    "readlinkat": (267, 78), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "dup": (32, 23),
    "dup2": (33, None), "dup3": (292, 24), "pipe": (22, None), "pipe2": (293, 59), "poll": (7, None),
    "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72), "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22), "ftruncate": (77, 46),
    "fsync": (74, 82), "mkdir": (83, None), "mkdirat": (258, 34), "unlink": (87, None), "unlinkat": (263, 35),
    "rmdir": (84, None), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "umask": (95, 166),
    "mmap": (9, 222), "munmap": (11, 215), "mremap": (25, 216), "mprotect": (10, 226), "madvise": (28, 233),
    "brk": (12, 214), "membarrier": (324, 283), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139), "sigaltstack": (131, 132), "alarm": (37, None), "setitimer": (38, 103),
    "getitimer": (36, 102), "pause": (34, None), "restart_syscall": (219, 128), "futex": (202, 98),
    "set_robust_list": (273, 99), "rseq": (334, 293), "set_tid_address": (218, 96), "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "nanosleep": (35, 101), "gettimeofday": (96, 169), "time": (201, None),
    "times": (100, 153), "getrusage": (98, 165), "getrlimit": (97, 163), "getpid": (39, 172), "getppid": (110, 173),
    "gettid": (186, 178), "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getgroups": (115, 158), "uname": (63, 160), "sysinfo": (99, 179), "getrandom": (318, 278),
    "arch_prctl": (158, None), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
CLONE, CLONE3, FCNTL, PRLIMIT = (56, 220), (435, 435), (72, 25), (302, 261)
MOUNT_CALLS = {"pivot_root": (155, 41), "capset": (126, 91)}
CLONE_THREAD = 0x10000
FCNTL_ALLOWED = (0, 1, 2, 3, 4, 1030)  # duplicate, flags; no owners, signals, leases, locks or pipe sizes
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446


def check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def die_with_parent(signal: int) -> None:
    check(LIBC.prctl(PR_SET_PDEATHSIG, signal, 0, 0, 0), "prctl")


def enter_namespaces() -> None:
    """New namespaces for this process, the pid one for its children. Raises OSError."""
    uid, gid = os.geteuid(), os.getegid()
    wanted = CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS
    check(LIBC.unshare(wanted), "unshare")
    with suppress(OSError):  # without a mapping it is nobody, which will do
        for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)


def make_root(paths: list[str]) -> bool:
    """Turn the working directory into the root of all files: `paths` read-only and an empty ROOM. Whether it could."""
    try:
        mount(None, "/", None, MS_REC | MS_PRIVATE)
        root = os.getcwd()
        mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={DISK},nr_inodes=2000,mode=755")
        for path in paths:
            place(path, root + path)
        os.mkdir(root + ROOM)
        os.chdir(root)
        check(LIBC.syscall(number(MOUNT_CALLS["pivot_root"]), b".", b"."), "pivot_root")
        check(LIBC.umount2(b".", MNT_DETACH), "umount2")
        os.chdir(ROOM)
        return True
    except OSError:
        return False


def place(path: str, at: str) -> None:
    """The file, folder or link `path` to be seen at `at`, read-only."""
    os.makedirs(os.path.dirname(at), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), at)
        return
    if os.path.isdir(path):
        os.makedirs(at, exist_ok=True)
    else:
        open(at, "x").close()
    mount(path, at, None, MS_BIND | MS_REC)
    had = os.statvfs(at).f_flag  # flags of a mount from outside are locked and must be repeated
    keep = had & (MS_NOSUID | MS_NODEV | 8 | 1024 | 2048) | (MS_RELATIME if had & ST_RELATIME else 0)
    mount(None, at, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | keep)


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    as_bytes = [None if text is None else text.encode() for text in (source, target, kind, data)]
    a, b, c, d = as_bytes
    check(LIBC.mount(a, b, c, ctypes.c_ulong(flags), d), f"mount {target}")


def restrict_files(readable: list[str], writable: list[str]) -> int:
    """Landlock: reading below `readable`, working below `writable`, and nothing else. Its version, 0 for none."""
    version = max(0, LIBC.syscall(LANDLOCK_CREATE, None, 0, 1))
    if not version:
        return 0
    write_file, read_file, read_dir, truncate = 2, 4, 8, 1 << 14
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    network, scope = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    attributes = struct.pack("QQQ", handled, network, scope)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = check(LIBC.syscall(LANDLOCK_CREATE, attributes, len(attributes), 0), "landlock")
    changes = handled & (write_file | truncate | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8)  # remove and make folders and files
    for path, rights in [(p, 0) for p in readable] + [(p, changes) for p in writable]:
        with suppress(FileNotFoundError):
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            reading = read_file | (read_dir if os.path.isdir(path) else 0)
            rule = struct.pack("=Qi", rights | reading, fd)
            check(LIBC.syscall(LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock {path}")
            os.close(fd)
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    check(LIBC.syscall(LANDLOCK_RESTRICT, ruleset, 0), "landlock")
    os.close(ruleset)
    return version


def limit(seconds: int, memory: int, own_user: bool) -> None:
    """`own_user`: the count of processes is this namespace's, not that of everything its user runs."""
    limits = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: DISK,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    } | ({resource.RLIMIT_NPROC: THREADS} if own_user else {})
    for which, value in limits.items():
        resource.setrlimit(which, (value, value))


def number(column: tuple[int, int | None]) -> int:
    found = column[MACHINES[os.uname().machine][0]]
    assert found is not None
    return found


def drop_capabilities() -> None:
    """Those that came with the user namespace or with being root."""
    header, nothing = struct.pack("Ii", CAPABILITIES_V3, 0), bytes(24)
    check(LIBC.syscall(number(MOUNT_CALLS["capset"]), header, nothing), "capset")


def filter_calls() -> bool:
    """Seccomp, in BPF: allow the table above, answer EACCES to all else. Whether it could."""
    if os.uname().machine not in MACHINES:
        return False
    column, architecture = MACHINES[os.uname().machine]
    load, equal, any_bit, done = 0x20, 0x15, 0x45, 0x06
    allow, kill = 0x7FFF0000, 0x80000000
    deny, missing = 0x50000 | errno.EACCES, 0x50000 | errno.ENOSYS

    def argument(i: int) -> tuple[int, int, int, int]:
        return load, 0, 0, 16 + 8 * i  # its lower half

    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (done, 0, 0, kill), (load, 0, 0, 0)]
    for numbers in ALLOWED.values():
        if (call := numbers[column]) is not None:
            program += [(equal, 0, 1, call), (done, 0, 0, allow)]
    # Threads, not processes. clone3 hides its flags behind a pointer: libc falls back to clone where it is missing.
    program += [(equal, 0, 1, number(CLONE3)), (done, 0, 0, missing)]
    program += [(equal, 0, 4, number(CLONE)), argument(0), (any_bit, 0, 1, CLONE_THREAD)]
    program += [(done, 0, 0, allow), (done, 0, 0, deny)]
    program += [(equal, 0, 4, number(PRLIMIT)), argument(0), (equal, 0, 1, 0), (done, 0, 0, allow), (done, 0, 0, deny)]
    program += [(equal, 0, 2 * len(FCNTL_ALLOWED) + 1, number(FCNTL)), argument(1)]
    for command in FCNTL_ALLOWED:
        program += [(equal, 0, 1, command), (done, 0, 0, allow)]
    program += [(done, 0, 0, deny)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    return LIBC.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0) == 0


def isolate(means: str, paths: list[str], seconds: int, memory: int) -> list[str]:
    """All of it for this process, the first in its pid namespace if there is one. What held, for the parent to judge.

    `means`: namespaces, which were entered; bubblewrap, which made namespaces and a root; or landlock, without either.
    """
    apart = means != "landlock"
    root = means == "bubblewrap" or (apart and make_root(paths))
    files = restrict_files(paths, [ROOM] if root else [])
    limit(seconds, memory, own_user=apart)
    drop_capabilities()
    held = {
        "namespaces": apart,
        "root": root,
        f"landlock {files}": files > 0,
        "rlimits": True,
        "seccomp": filter_calls(),
    }
    return [name for name, there in held.items() if there]
