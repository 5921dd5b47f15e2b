//! The system calls a VMM makes, by kind of thread, each with its reason.
//!
//! A call is allowed on the threads whose list it is in. The lists of device kinds are in their folders
//! ([`virtio_devices::registry::Kind::syscalls`]). Threads inherit the filter of the thread that makes them, so the
//! control thread, which makes all others, is allowed everything in this file.

/// What an argument has to be. Only the lower 32 bits are looked at: that is what the kernel does with them, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Test {
    /// Under the mask (second) it has the value (third); the first is the argument's index.
    Masked(u8, u32, u32),
    /// It is this process' id.
    OwnProcess(u8),
}

/// One row: the call's number, what its arguments have to be (all of it), and what it is needed for. A number that is
/// there several times is allowed if one of its rows fits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rule {
    pub number: i64,
    pub tests: &'static [Test],
    #[cfg_attr(not(test), expect(dead_code, reason = "for the reader of the table"))]
    pub why: &'static str,
}

const fn always(number: i64, why: &'static str) -> Rule {
    Rule { number, tests: &[], why }
}

const fn when(number: i64, tests: &'static [Test], why: &'static str) -> Rule {
    Rule { number, tests, why }
}

/// `ioctl` with a command of this group and number; size and direction follow from them.
macro_rules! ioctl {
    ($group:expr, $number:expr, $why:expr) => {
        when(libc::SYS_ioctl, &[Test::Masked(1, 0xffff, ($group as u32) << 8 | $number)], $why)
    };
}

/// Group of KVM's commands.
const KVM: u8 = 0xae;
/// Group of userfaultfd's commands.
const USERFAULTFD: u8 = 0xaa;
/// Group of terminals' commands.
const TERMINAL: u8 = b'T';
const ALL: u32 = u32::MAX;
const EXECUTABLE: u32 = libc::PROT_EXEC.cast_unsigned();
const THREAD: u32 = libc::CLONE_THREAD.cast_unsigned();

/// On every thread.
pub(super) const EVERY: &[Rule] = &[
    always(libc::SYS_read, "eventfds, input"),
    always(libc::SYS_write, "eventfds, serial output, the log, a panic's message"),
    always(libc::SYS_close, "drop descriptors"),
    always(libc::SYS_futex, "locks, channels, joining threads"),
    when(libc::SYS_mmap, &[Test::Masked(2, EXECUTABLE, 0)], "memory, never executable"),
    when(libc::SYS_mprotect, &[Test::Masked(2, EXECUTABLE, 0)], "the allocator's arenas grow"),
    always(libc::SYS_munmap, "memory"),
    always(libc::SYS_mremap, "the allocator moves large blocks"),
    always(libc::SYS_madvise, "the allocator gives back; a thread's stack when it ends"),
    always(libc::SYS_brk, "the main arena of the allocator"),
    always(libc::SYS_getrandom, "seeds of hash maps"),
    always(libc::SYS_clock_gettime, "time, where it has to be asked of the kernel"),
    always(libc::SYS_gettimeofday, "as clock_gettime"),
    always(libc::SYS_clock_nanosleep, "waiting before trying again"),
    always(libc::SYS_nanosleep, "as clock_nanosleep"),
    always(libc::SYS_sched_yield, "contended locks"),
    always(libc::SYS_restart_syscall, "a call goes on after the process was stopped"),
    always(libc::SYS_rt_sigreturn, "the end of a signal handler"),
    always(libc::SYS_rt_sigprocmask, "threads start and end, abort"),
    when(libc::SYS_rt_sigaction, &[Test::Masked(0, ALL, libc::SIGABRT.cast_unsigned())], "abort"),
    always(libc::SYS_sigaltstack, "threads start and end"),
    always(libc::SYS_set_robust_list, "threads start"),
    always(libc::SYS_rseq, "threads start"),
    always(libc::SYS_sched_getaffinity, "threads start"),
    when(libc::SYS_prctl, &[Test::Masked(0, ALL, libc::PR_SET_NAME.cast_unsigned())], "threads start"),
    when(libc::SYS_prctl, &[Test::Masked(0, ALL, libc::PR_GET_NAME.cast_unsigned())], "a trap's message"),
    when(libc::SYS_prctl, &[Test::Masked(0, ALL, PR_SET_VMA)], "the allocator names its memory"),
    when(libc::SYS_prctl, &[Test::Masked(0, ALL, PR_GET_AUXV)], "the size of a page"),
    when(
        libc::SYS_fcntl,
        &[Test::Masked(1, ALL, libc::F_GETFD.cast_unsigned())],
        "builds with checks drop descriptors",
    ),
    always(libc::SYS_gettid, "abort"),
    always(libc::SYS_getpid, "abort, kick a vCPU"),
    when(libc::SYS_tgkill, &[Test::OwnProcess(0)], "abort, kick a vCPU"),
    always(libc::SYS_exit, "threads end"),
    always(libc::SYS_exit_group, "the process ends"),
    ioctl!(KVM, 0xa5, "KVM_SIGNAL_MSI: interrupts"),
    ioctl!(TERMINAL, 0x02, "TCSETS: restore the terminal before dying"),
    ioctl!(TERMINAL, 0x2b, "TCSETS2: restore the terminal before dying"),
];

/// `PR_SET_VMA` of `linux/prctl.h`.
const PR_SET_VMA: u32 = 0x5356_4d41;
/// `PR_GET_AUXV` of `linux/prctl.h`.
const PR_GET_AUXV: u32 = 0x4155_5856;

/// On vCPUs' threads.
pub(super) const VCPU: &[Rule] = &[
    ioctl!(KVM, 0x80, "KVM_RUN"),
    ioctl!(KVM, 0x79, "KVM_IOEVENTFD: the driver starts and resets devices"),
    ioctl!(KVM, 0xad, "KVM_KVMCLOCK_CTRL: the guest was paused"),
];

/// On devices' threads, beside what the device's kind lists.
pub(super) const DEVICE: &[Rule] = &[
    always(libc::SYS_epoll_create1, "the worker's loop"),
    always(libc::SYS_epoll_ctl, "the worker's loop"),
    always(libc::SYS_epoll_pwait, "the worker's loop"),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_epoll_wait, "the worker's loop"),
];

/// On the thread that restores memory on demand.
pub(super) const ONDEMAND: &[Rule] = &[
    always(libc::SYS_ppoll, "wait for page faults"),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_poll, "wait for page faults"),
    always(libc::SYS_pread64, "read the snapshot's memory"),
    ioctl!(USERFAULTFD, 0x03, "UFFDIO_COPY: fill pages"),
    ioctl!(USERFAULTFD, 0x04, "UFFDIO_ZEROPAGE: fill pages"),
];

/// A call that makes threads; a device kind whose thread does that lists it.
pub(super) const CLONE: Rule = when(libc::SYS_clone, &[Test::Masked(0, THREAD, THREAD)], "threads, never processes");

/// What `fork` is to the C library: it shares nothing, and what is forked has the same filter and no way to another
/// program.
const FORK: u32 = (libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID | libc::SIGCHLD).cast_unsigned();

/// On the control thread.
pub(super) const CONTROL: &[Rule] = &[
    CLONE,
    when(libc::SYS_clone, &[Test::Masked(0, ALL, FORK)], "fork the writer of a live snapshot"),
    always(libc::SYS_close_range, "what the writer does not need"),
    always(libc::SYS_wait4, "the writer has ended"),
    always(libc::SYS_seccomp, "confine new threads"),
    when(libc::SYS_prctl, &[Test::Masked(0, ALL, libc::PR_SET_NO_NEW_PRIVS.cast_unsigned())], "confine new threads"),
    always(libc::SYS_landlock_create_ruleset, "confine the process to files"),
    always(libc::SYS_landlock_add_rule, "confine the process to files"),
    always(libc::SYS_landlock_restrict_self, "confine the process to files"),
    when(libc::SYS_ioctl, &[Test::Masked(1, 0xff00, (KVM as u32) << 8)], "all of KVM's: build a machine"),
    always(libc::SYS_userfaultfd, "restore memory on demand"),
    ioctl!(USERFAULTFD, 0x3f, "UFFDIO_API: restore memory on demand"),
    ioctl!(USERFAULTFD, 0x00, "UFFDIO_REGISTER, and USERFAULTFD_IOC_NEW of the device: restore memory on demand"),
    ioctl!(TERMINAL, 0x01, "TCGETS: is it a terminal?"),
    ioctl!(TERMINAL, 0x2a, "TCGETS2: is it a terminal?"),
    ioctl!(TERMINAL, 0x13, "TIOCGWINSZ: the terminal's size"),
    ioctl!(TERMINAL, 0x30, "TIOCGPTN: name of a pseudo-terminal"),
    ioctl!(TERMINAL, 0x31, "TIOCSPTLCK: unlock a pseudo-terminal"),
    // The same group as terminals'.
    ioctl!(TERMINAL, 0xca, "TUNSETIFF: attach to a tap"),
    ioctl!(TERMINAL, 0xd2, "TUNGETIFF: is it a tap?"),
    ioctl!(TERMINAL, 0x41, "TIOCGPTPEER: open a pseudo-terminal's other end"),
    ioctl!(TERMINAL, 0x21, "FIONBIO: sockets that do not block"),
    ioctl!(0x12, 0x72, "BLKGETSIZE64: size of a disk that is a block device"),
    ioctl!(0x12, 0x68, "BLKSSZGET: sector size of a block device"),
    ioctl!(0x12, 0x7b, "BLKPBSZGET: physical sector size of a block device"),
    always(libc::SYS_openat, "kernel, images, streams"),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_open, "the multiplexer of pseudo-terminals"),
    always(libc::SYS_getdents64, "clear the folder of the graphics relay's socket"),
    always(libc::SYS_mkdirat, "the folder of the graphics relay's socket"),
    always(libc::SYS_fstat, "kind and size of files"),
    always(libc::SYS_newfstatat, "kind and size of files"),
    always(libc::SYS_statx, "kind and size of files"),
    always(libc::SYS_fstatfs, "kind of a file system"),
    always(libc::SYS_lseek, "read kernel and initramfs"),
    always(libc::SYS_pread64, "read kernel and images' headers"),
    always(libc::SYS_pwrite64, "images"),
    always(libc::SYS_readv, "read kernel and initramfs"),
    always(libc::SYS_writev, "log, sockets"),
    always(libc::SYS_fsync, "snapshots are on the disk before they have a name"),
    always(libc::SYS_ftruncate, "size of shared memory"),
    always(libc::SYS_fcntl, "duplicate, make non-blocking, lock images"),
    always(libc::SYS_flock, "lock images"),
    always(libc::SYS_dup, "duplicate descriptors"),
    always(libc::SYS_readlinkat, "paths of descriptors"),
    always(libc::SYS_getcwd, "make paths absolute"),
    always(libc::SYS_unlinkat, "remove sockets"),
    always(libc::SYS_renameat, "give a socket its name when it listens"),
    always(libc::SYS_renameat2, "as renameat"),
    always(libc::SYS_fchmod, "who may use a socket"),
    always(libc::SYS_fchmodat, "who may use a socket"),
    always(libc::SYS_memfd_create, "shared guest memory"),
    always(libc::SYS_eventfd2, "doorbells"),
    always(libc::SYS_timerfd_create, "devices' timers"),
    always(libc::SYS_timerfd_settime, "devices' timers"),
    always(libc::SYS_pipe2, "wake threads"),
    always(libc::SYS_ppoll, "is there input?"),
    always(libc::SYS_socket, "make sockets"),
    always(libc::SYS_socketpair, "make sockets"),
    always(libc::SYS_bind, "make sockets"),
    always(libc::SYS_listen, "make sockets"),
    always(libc::SYS_connect, "does another process use the socket? the compositor"),
    always(libc::SYS_accept4, "the API's clients"),
    always(libc::SYS_getsockopt, "kind of a socket"),
    always(libc::SYS_setsockopt, "buffers of a socket"),
    always(libc::SYS_getsockname, "name of a socket"),
    always(libc::SYS_getpeername, "name of a socket"),
    always(libc::SYS_recvfrom, "the API's clients"),
    always(libc::SYS_recvmsg, "the API's clients, with descriptors"),
    always(libc::SYS_sendto, "the API's clients"),
    always(libc::SYS_sendmsg, "the API's clients"),
    always(libc::SYS_shutdown, "the API's clients"),
    always(libc::SYS_prlimit64, "size of the main thread's stack"),
    always(libc::SYS_geteuid, "whose files a guest may use"),
    always(libc::SYS_sysinfo, "the host's memory"),
    when(libc::SYS_rt_sigaction, &[], "signals' handlers"),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_open, "as openat"),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_mkdir, "the folder of the graphics relay's socket"),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_rmdir, "the folder of the graphics relay's socket"),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_stat, "as statx"),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_lstat, "as statx"),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_unlink, "remove sockets"),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_rename, "give a socket its name when it listens"),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_readlink, "paths of descriptors"),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_poll, "is there input?"),
    #[cfg(target_arch = "x86_64")]
    always(libc::SYS_chmod, "who may use a socket"),
];

/// Calls that are refused with `ENOSYS` instead of ending the process, on threads that do not list them: a panic's
/// backtrace wants files, and does without.
pub(super) const REFUSED: &[i64] = &[
    libc::SYS_openat,
    libc::SYS_getcwd,
    libc::SYS_readlinkat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_stat,
];

/// Refused with `ENOSYS` on every thread: its arguments are in memory, where no filter sees them. The C library then
/// uses `clone`.
pub(super) const CLONE3: i64 = libc::SYS_clone3;
