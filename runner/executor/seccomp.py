"""Which system calls a step may make: a list of what is allowed, all else is refused with EPERM.

Compilers, package managers, test suites, debuggers of their own children and browsers' build tools work.
Left out on purpose: AF_ALG and VSOCK sockets, io_uring, userfaultfd, kernel keys, bpf, performance events,
everything that mounts, new namespaces, opening files by handle, modules, clocks, reboot, and touching
the first process of the container, which reports how the step ended.
"""

import json
from typing import Any, Final

# CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET, NEWTIME
_NAMESPACES: Final = (
    0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000 | 0x80
)
_AF_NFC: Final = 39  # 38 is AF_ALG, the kernel's own cryptography; 40 is VSOCK, the way to the machine's host
_FIRST_PROCESS: Final = 1
_ENOSYS: Final = 38

_FILES: Final = """
    access chdir chmod chown chown32 close close_range copy_file_range creat dup dup2 dup3 faccessat
    faccessat2 fadvise64 fadvise64_64 fallocate fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat
    fcntl fcntl64 fdatasync fgetxattr flistxattr flock fremovexattr fsetxattr fstat fstat64 fstatat64
    fstatfs fstatfs64 fsync ftruncate ftruncate64 futimesat getcwd getdents getdents64 getxattr getxattrat
    ioctl lchown lchown32 lgetxattr link linkat listxattr listxattrat llistxattr _llseek lremovexattr lseek
    lsetxattr lstat lstat64 mkdir mkdirat mknod mknodat name_to_handle_at newfstatat _newselect open openat
    openat2 pipe pipe2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readahead readlink readlinkat
    readv removexattr removexattrat rename renameat renameat2 rmdir sendfile sendfile64 setxattr setxattrat
    splice stat stat64 statfs statfs64 statx symlink symlinkat sync sync_file_range sync_file_range2
    arm_sync_file_range syncfs tee truncate truncate64 umask unlink unlinkat utime utimensat
    utimensat_time64 utimes vmsplice write writev cachestat fanotify_mark inotify_add_watch inotify_init
    inotify_init1 inotify_rm_watch
"""
_PROCESSES: Final = """
    alarm capget capset execve execveat exit exit_group fork getcpu getegid getegid32 geteuid geteuid32
    getgid getgid32 getgroups getgroups32 getitimer getpgid getpgrp getpid getppid getpriority getresgid
    getresgid32 getresuid getresuid32 getrlimit get_robust_list getrusage getsid get_thread_area gettid
    getuid getuid32 ioprio_get ioprio_set kill landlock_add_rule landlock_create_ruleset
    landlock_restrict_self nice pause pidfd_open pidfd_send_signal prctl prlimit64 restart_syscall
    rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait
    rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_getaffinity sched_getattr sched_getparam
    sched_get_priority_max sched_get_priority_min sched_getscheduler sched_rr_get_interval
    sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler
    sched_yield seccomp setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32
    setitimer setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid
    setreuid32 setrlimit set_robust_list setsid set_thread_area set_tid_address setuid setuid32 sgetmask
    sigaction sigaltstack signal signalfd signalfd4 sigpending sigprocmask sigreturn sigsuspend ssetmask
    sysinfo tgkill time times tkill ugetrlimit uname vfork wait4 waitid waitpid rseq arch_prctl modify_ldt
    set_tls breakpoint cacheflush arm_fadvise64_64 riscv_flush_icache riscv_hwprobe
"""
_MEMORY: Final = """
    brk madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap
    mmap2 mprotect mremap mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect
    process_madvise process_mrelease remap_file_pages
"""
_WAITING: Final = """
    clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep clock_nanosleep_time64
    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old
    eventfd eventfd2 futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake getrandom
    gettimeofday io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit
    nanosleep poll ppoll ppoll_time64 pselect6 pselect6_time64 select timer_create timer_delete
    timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create
    timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64
"""
_TALKING: Final = """
    accept accept4 bind connect getpeername getsockname getsockopt listen mq_getsetattr mq_notify mq_open
    mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink msgctl msgget msgrcv
    msgsnd recv recvfrom recvmmsg recvmmsg_time64 recvmsg semctl semget semop semtimedop semtimedop_time64
    send sendmmsg sendmsg sendto setsockopt shmat shmctl shmdt shmget shutdown socketpair ipc
"""
ALLOWED: Final = tuple(sorted(set(" ".join((_FILES, _PROCESSES, _MEMORY, _WAITING, _TALKING)).split())))

_ARCHITECTURES: Final = (
    ("SCMP_ARCH_X86_64", ["SCMP_ARCH_X86", "SCMP_ARCH_X32"]),
    ("SCMP_ARCH_AARCH64", ["SCMP_ARCH_ARM"]),
)


def make_profile() -> str:
    """The profile in the engine's own notation."""
    calls = [
        _allow(*ALLOWED),
        _allow("clone", _argument(0, "SCMP_CMP_MASKED_EQ", _NAMESPACES, 0)),
        # Its flags lie in memory, where no filter sees them; told that it does not exist, libc takes clone.
        {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": _ENOSYS},
        _allow("socket", _argument(0, "SCMP_CMP_LT", _AF_NFC - 1)),
        _allow("socket", _argument(0, "SCMP_CMP_EQ", _AF_NFC)),
        _allow("socket", _argument(0, "SCMP_CMP_GT", _AF_NFC + 1)),
        _allow("ptrace", _argument(1, "SCMP_CMP_NE", _FIRST_PROCESS)),
        _allow("process_vm_readv", _argument(0, "SCMP_CMP_NE", _FIRST_PROCESS)),
        _allow("process_vm_writev", _argument(0, "SCMP_CMP_NE", _FIRST_PROCESS)),
        *(
            _allow("personality", _argument(0, "SCMP_CMP_EQ", p))
            for p in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF)
        ),
    ]
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "archMap": [{"architecture": main, "subArchitectures": others} for main, others in _ARCHITECTURES],
        "syscalls": calls,
    }
    return json.dumps(profile, separators=(",", ":"))


def _allow(*names: str | dict[str, Any]) -> dict[str, Any]:
    """Allow these calls; a dict among the names is a condition on an argument."""
    return {
        "names": [name for name in names if isinstance(name, str)],
        "action": "SCMP_ACT_ALLOW",
        "args": [condition for condition in names if isinstance(condition, dict)],
    }


def _argument(index: int, operator: str, value: int, second: int = 0) -> dict[str, Any]:
    return {"index": index, "op": operator, "value": value, "valueTwo": second}
