//! Ways to write a running machine's memory out as it is at one moment: fork, write protection, dirty logging. Each on a new
//! [`Machine`], whose guest writes again to what it had changed before as soon as it is let go.
#![expect(unsafe_code, reason = "fork, and the commands of userfaultfd")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use tests::tiny;

use crate::Failure;
use crate::report::{self, Report, Samples};
use crate::shape::{BYTES, Machine, Memory, PAGE, Template, memory_file};

/// What is written at once: as much as a snapshot hashes at once.
const CHUNK: usize = 64 << 10;

/// The names in reports.
const ARMS: [&str; 3] = ["fork", "write protection", "dirty logging"];

/// What one way costs.
struct Cost {
    /// How long the guest stands still.
    pause: Duration,
    /// From the beginning until all is written.
    out: Duration,
    /// CPU time of that, in the process or thread that writes.
    cpu: Duration,
    /// How long the guest takes to write to its pages the first time after.
    round: Duration,
}

/// The costs of all ways, by run.
#[derive(Default)]
pub struct Ways {
    pause: [Samples; ARMS.len()],
    out: [Samples; ARMS.len()],
    cpu: [Samples; ARMS.len()],
    page: [Samples; ARMS.len()],
}

impl Ways {
    /// Each way once.
    pub fn run(&mut self, template: &Template) -> Result<(), Failure> {
        for (arm, way) in [fork, write_protect, log].into_iter().enumerate() {
            let (mut machine, undisturbed) = Machine::new(template)?;
            let cost = way(&mut machine)?;
            let ms = |time: Duration| time.as_secs_f64() * 1e3;
            self.pause[arm].add(ms(cost.pause));
            self.out[arm].add(ms(cost.out));
            self.cpu[arm].add(ms(cost.cpu));
            let page = (ms(cost.round) - ms(undisturbed)) * 1e3 / f64::from(tiny::TOUCHED);
            self.page[arm].add(page);
        }
        Ok(())
    }

    pub fn reports(&self) -> Vec<Report> {
        let metrics = [
            ("live_memory_pause_ms", "ms", &self.pause),
            ("live_memory_out_ms", "ms", &self.out),
            ("live_memory_cpu_ms", "ms", &self.cpu),
            ("live_memory_page_us", "us", &self.page),
        ];
        metrics.into_iter().flat_map(|(metric, unit, samples)| report::compare(metric, unit, &ARMS, samples)).collect()
    }
}

fn thread_time() -> Result<Duration, Failure> {
    Ok(Duration::try_from(clock_gettime(ClockId::ThreadCPUTime))?)
}

/// A child has the memory as it was.
fn fork(machine: &mut Machine) -> Result<Cost, Failure> {
    let file = memory_file()?;
    let (mut ended, mut end) = std::io::pipe()?;
    let start = Instant::now();
    // SAFETY: this process has one thread, and the child calls nothing but its own code.
    let child = match unsafe { libc::fork() } {
        -1 => return Err(std::io::Error::last_os_error().into()),
        0 => {
            let times = write_all(&machine.memory, &file, start);
            let done = times.and_then(|times| {
                let nanoseconds = times.map(|time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).to_ne_bytes());
                Ok(end.write_all(nanoseconds.as_flattened())?)
            });
            // SAFETY: it ends the process.
            unsafe { libc::_exit(i32::from(done.is_err())) }
        }
        child => child,
    };
    let pause = start.elapsed();
    drop(end);
    let round = machine.cpu.run_to(b':')?;
    let mut times = [[0; 8]; 2];
    ended.read_exact(times.as_flattened_mut())?;
    // SAFETY: our child, and no status is asked for.
    unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
    let [out, cpu] = times.map(|time| Duration::from_nanos(u64::from_ne_bytes(time)));
    Ok(Cost { pause, out, cpu, round })
}

/// Writes all of it: the time since `start`, and the CPU time of this thread.
fn write_all(memory: &Memory, file: &OwnedFd, start: Instant) -> Result<[Duration; 2], Failure> {
    for at in (0..BYTES).step_by(CHUNK) {
        memory.write_out(file, at, CHUNK)?;
    }
    Ok([start.elapsed(), thread_time()?])
}

/// The machine's memory is protected, and a thread lets go of each part when it is written: in order, but what the guest
/// waits for comes first.
fn write_protect(machine: &mut Machine) -> Result<Cost, Failure> {
    let file = memory_file()?;
    let uffd = Uffd::open()?;
    let base = machine.memory.address();
    uffd.register(base, BYTES as u64)?;
    let start = Instant::now();
    uffd.protect(base, BYTES as u64, true)?;
    let pause = start.elapsed();
    let (cpu, memory) = (&mut machine.cpu, &machine.memory);
    thread::scope(|scope| {
        let writer = scope.spawn(|| let_go(memory, &file, &uffd, start).map_err(|e| e.to_string()));
        let round = cpu.run_to(b':')?;
        let (out, cpu) = writer.join().map_err(|_| "the writer panicked")??;
        Ok(Cost { pause, out, cpu, round })
    })
}

/// What that thread does: the time since `start` and its CPU time.
fn let_go(memory: &Memory, file: &OwnedFd, uffd: &Uffd, start: Instant) -> Result<(Duration, Duration), Failure> {
    let mut done = vec![false; BYTES / CHUNK];
    let mut save = |chunk: usize| -> Result<(), Failure> {
        if let Some(done @ false) = done.get_mut(chunk) {
            memory.write_out(file, chunk * CHUNK, CHUNK)?;
            *done = true;
        }
        uffd.protect(memory.address() + (chunk * CHUNK) as u64, CHUNK as u64, false)
    };
    for chunk in 0..BYTES / CHUNK {
        while let Some(address) = uffd.fault()? {
            save(usize::try_from(address - memory.address())? / CHUNK)?;
        }
        save(chunk)?;
    }
    Ok((start.elapsed(), thread_time()?))
}

/// All is written while the machine runs; it stands still for what it has changed meanwhile, which is never less than the
/// part that it writes to all the time.
fn log(machine: &mut Machine) -> Result<Cost, Failure> {
    let file = memory_file()?;
    let start = Instant::now();
    machine.log_dirty()?;
    let (guest, memory) = (&mut machine.cpu, &machine.memory);
    let (round, cpu) = thread::scope(|scope| {
        let writer = scope.spawn(|| write_all(memory, &file, start).map_err(|e| e.to_string()));
        let round = guest.run_to(b':')?;
        let [_, cpu] = writer.join().map_err(|_| "the writer panicked")??;
        Ok::<_, Failure>((round, cpu))
    })?;
    let (stopped, before) = (Instant::now(), thread_time()?);
    let mut pages = 0;
    for (word, bits) in machine.dirty()?.into_iter().enumerate() {
        for bit in (0..64).filter(|bit| bits >> bit & 1 == 1) {
            machine.memory.write_out(&file, (word * 64 + bit) * PAGE, PAGE)?;
            pages += 1;
        }
    }
    if pages < tiny::TOUCHED {
        return Err(format!("{pages} pages were dirty").into());
    }
    let cpu = cpu + thread_time()?.saturating_sub(before);
    Ok(Cost { pause: stopped.elapsed(), out: start.elapsed(), cpu, round })
}

/// Write protection by userfaultfd(2), with the numbers of `linux/userfaultfd.h`.
struct Uffd(File);

/// `UFFDIO_API`: with write protection, also of memory that is a file's.
const API: (u64, [u64; 3]) = (0xc018_aa3f, [0xaa, 1 | 1 << 12, 0]);
const REGISTER: u64 = 0xc020_aa00;
const MODE_WP: u64 = 2;
const WRITEPROTECT: u64 = 0xc018_aa06;
const EVENT_PAGEFAULT: u8 = 0x12;

impl Uffd {
    fn open() -> Result<Self, Failure> {
        // SAFETY: the call takes flags.
        let number = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        if number < 0 {
            return Err(format!("write protection needs userfaultfd: {}", std::io::Error::last_os_error()).into());
        }
        // SAFETY: the kernel has just made it.
        let this = Self(unsafe { File::from_raw_fd(i32::try_from(number)?) });
        this.command(API.0, API.1)?;
        Ok(this)
    }

    fn command<const N: usize>(&self, command: u64, mut words: [u64; N]) -> Result<(), Failure> {
        // SAFETY: each command's structure is as many words as the caller gives. None of them changes what memory holds.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), command, words.as_mut_ptr()) } {
            0.. => Ok(()),
            _ => Err(format!("userfaultfd, {command:#x}: {}", std::io::Error::last_os_error()).into()),
        }
    }

    fn register(&self, start: u64, len: u64) -> Result<(), Failure> {
        self.command(REGISTER, [start, len, MODE_WP, 0])
    }

    /// Protects memory or lets go of it; that wakes who waits for it.
    fn protect(&self, start: u64, len: u64, on: bool) -> Result<(), Failure> {
        self.command(WRITEPROTECT, [start, len, u64::from(on)])
    }

    /// The address that somebody waits to write to.
    fn fault(&self) -> Result<Option<u64>, Failure> {
        let mut message = [0u8; 32];
        match rustix::io::read(&self.0, &mut message) {
            Err(Errno::AGAIN) => Ok(None),
            Err(e) => Err(e.into()),
            Ok(_) if message[0] == EVENT_PAGEFAULT => {
                Ok(message.as_chunks().0.get(2).map(|word| u64::from_ne_bytes(*word)))
            }
            Ok(_) => Err("userfaultfd says something else".into()),
        }
    }
}
