//! Processes that this one forks: a zygote its clones, a VMM the writer of a live snapshot.
#![expect(unsafe_code, reason = "fork, close_range and SIGCHLD")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::panic::AssertUnwindSafe;

/// Runs `child` in a process of its own, which ends with the status that it returns; the process id of that. The child has
/// the calling thread only. What the others were in the middle of stays so for ever: either there are none
/// ([`only_one_thread`]), or they are known to rest, and `child` takes no lock but the allocator's, which the C library
/// has in order.
///
/// # Errors
/// If the system refuses.
pub fn fork(child: impl FnOnce() -> u8) -> io::Result<u32> {
    // SAFETY: the child calls nothing that needs another thread or a lock that one may hold, as the caller promised, and
    // never returns to it, nor unwinds into it: nothing of the caller's is dropped twice.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            // What the parent does about a panic needs the parent.
            drop(std::panic::take_hook());
            let status = std::panic::catch_unwind(AssertUnwindSafe(child)).map_or(PANICKED, i32::from);
            // SAFETY: it ends the process. Functions registered for its exit are the parent's to run.
            unsafe { libc::_exit(status) }
        }
        pid => u32::try_from(pid).map_err(io::Error::other),
    }
}

/// The status of a child that panicked: that of Rust's programs.
const PANICKED: i32 = 101;

/// Signals that ask to end do so again, without telling the parent.
///
/// # Errors
/// If the system refuses.
pub fn forget_signals() -> io::Result<()> {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: no handler is installed.
        if unsafe { libc::signal(signal, libc::SIG_DFL) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Signals that ask to end wait from now on, or come through again.
///
/// # Errors
/// If the system refuses.
pub fn hold_end_signals(hold: bool) -> io::Result<()> {
    // SAFETY: a set of numbers, for which zeroes are valid.
    let mut signals: libc::sigset_t = unsafe { std::mem::zeroed() };
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the set is this function's.
        unsafe { libc::sigaddset(&raw mut signals, signal) };
    }
    let how = if hold { libc::SIG_BLOCK } else { libc::SIG_UNBLOCK };
    // SAFETY: the old set is not asked for.
    match unsafe { libc::pthread_sigmask(how, &raw const signals, std::ptr::null_mut()) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// A file that would become longer than the process may make one (RLIMIT_FSIZE, setrlimit(2)) is an error of that write, not
/// the end of the process; those that are forked from it inherit that.
///
/// # Errors
/// If the system refuses.
pub fn survive_file_size_limit() -> io::Result<()> {
    // SAFETY: no handler is installed, and none is replaced.
    if unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) } == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether this process has one thread.
///
/// # Errors
/// If it has more, or cannot be found out.
pub fn only_one_thread() -> io::Result<()> {
    match std::fs::read_dir("/proc/self/task")?.count() {
        1 => Ok(()),
        n => Err(io::Error::other(format!("a zygote has one thread, and this one has {n}"))),
    }
}

/// Children that end are gone at once, without anybody having to ask for their status.
///
/// # Errors
/// If the system refuses.
pub fn never_wait_for_children() -> io::Result<()> {
    // SAFETY: no handler is installed, and none is replaced: this process has no other use of its children.
    if unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) } == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Closes all descriptors of this process but the standard streams and those in `keep`. Only for a child that has just
/// been made and will never touch, nor drop, what it has inherited of its parent's objects beside those.
///
/// # Errors
/// If the system cannot: Linux 5.9 or newer is needed.
pub fn close_all_but(keep: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut keep: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(fd.as_raw_fd()).ok()).collect();
    keep.sort_unstable();
    let mut first = 3;
    for fd in keep.into_iter().chain([u32::MAX]) {
        if let Some(last) = fd.checked_sub(1).filter(|last| *last >= first) {
            // SAFETY: the owners of these descriptors are objects that the child promised not to touch.
            if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        first = fd.saturating_add(1).max(first);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    use super::*;

    const CHILD: &str = "SPECTRUM_TEST_FORK";

    /// Not a test by itself: tests have threads, and a fork needs a process that has one.
    #[test]
    fn child_of_the_test_below() {
        if std::env::var_os(CHILD).is_none() {
            return;
        }
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let (closed, kept) = (File::open("/dev/null").unwrap(), File::open("/dev/zero").unwrap());
        fork(|| {
            close_all_but(&[theirs.as_fd(), kept.as_fd()]).unwrap();
            let open = |fd: &File| rustix::io::fcntl_getfd(fd).is_ok();
            theirs.write_all(&[u8::from(open(&closed)), u8::from(open(&kept)), 7]).unwrap();
            0
        })
        .unwrap();
        drop(theirs);
        let mut said = Vec::new();
        ours.read_to_end(&mut said).unwrap();
        assert_eq!(said, [0, 1, 7]);
        println!("the child closed what it should");
    }

    #[test]
    fn a_child_has_what_it_keeps_and_nothing_else() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", "--test-threads=1", "process::tests::child_of_the_test_below"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("the child closed what it should"), "{text}");
    }
}
