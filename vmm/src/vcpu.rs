//! vCPU threads.
//!
//! ```text
//!               Run ──────────▶ the thread is in the guest
//!   control ──▶ Pause ────────▶ it comes out, says so, and waits
//!               Stop ─────────▶ it ends
//! ```
//! A vCPU thread sees nothing but the buses and its own [`Wanted`].

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use devices::bus::Bus;
use hypervisor::kvm::kick_signal;
use hypervisor::{Exit, ExitHandler, Vcpu, VcpuState};
use vmm_sys_util::signal::Killable;

use crate::machine::MachineEvent;

/// The address spaces a vCPU reaches.
pub struct Buses {
    /// Port I/O.
    pub pio: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
}

struct Handler(Arc<Buses>);

impl ExitHandler for Handler {
    fn port_read(&mut self, port: u16, data: &mut [u8]) {
        self.0.pio.read(u64::from(port), data);
    }
    fn port_write(&mut self, port: u16, data: &[u8]) {
        self.0.pio.write(u64::from(port), data);
    }
    fn mmio_read(&mut self, address: u64, data: &mut [u8]) {
        self.0.mmio.read(address, data);
    }
    fn mmio_write(&mut self, address: u64, data: &[u8]) {
        self.0.mmio.write(address, data);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Stop,
}

struct State {
    wanted: Wanted,
    /// Threads that wait, or have ended.
    resting: usize,
    /// The vCPUs of waiting threads, by number: whoever has the machine paused may look at them.
    vcpus: Vec<Option<Box<dyn Vcpu>>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits, on the thread of vCPU `number`, until it is to run, and gives it back; nothing if it is to stop.
    fn rest(&self, number: usize, vcpu: Box<dyn Vcpu>) -> Option<Box<dyn Vcpu>> {
        let mut state = self.lock();
        if state.wanted == Wanted::Run {
            return Some(vcpu);
        }
        if let Some(slot) = state.vcpus.get_mut(number) {
            *slot = Some(vcpu);
        }
        state.resting += 1;
        self.changed.notify_all();
        while state.wanted == Wanted::Pause {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.resting -= 1;
        let vcpu = state.vcpus.get_mut(number).and_then(Option::take);
        vcpu.filter(|_| state.wanted == Wanted::Run)
    }

    /// Waits until it is to stop, counted as resting all the while.
    fn rest_for_good(&self) {
        let mut state = self.lock();
        state.resting += 1;
        self.changed.notify_all();
        while state.wanted != Wanted::Stop {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.resting -= 1;
    }

    /// The thread ends: from now on it rests.
    fn end(&self) {
        self.lock().resting += 1;
        self.changed.notify_all();
    }
}

/// A thread that will end.
struct Ending(Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// What runs first on each vCPU thread: installs its seccomp filter.
pub type ThreadSetup = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// Tells the control thread what happened. Called on vCPU threads.
pub type Report = Arc<dyn Fn(MachineEvent) + Send + Sync>;

/// All vCPU threads of a machine.
pub struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts a thread for each vCPU; they rest until [`Vcpus::run`].
    ///
    /// # Errors
    /// If a thread cannot start.
    pub fn start(
        vcpus: Vec<Box<dyn Vcpu>>,
        buses: &Arc<Buses>,
        setup: &ThreadSetup,
        report: &Report,
    ) -> io::Result<Self> {
        let slots = vcpus.iter().map(|_| None).collect();
        let state = State { wanted: Wanted::Pause, resting: 0, vcpus: slots };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let mut this = Self { shared, threads: Vec::new() };
        for (number, vcpu) in vcpus.into_iter().enumerate() {
            let (shared, handler) = (this.shared.clone(), Handler(buses.clone()));
            let (setup, report) = (setup.clone(), report.clone());
            let thread = std::thread::Builder::new().name(format!("vcpu{number}")).spawn(move || {
                // Also if it panics: who waits for it must not wait for ever.
                let ended = Ending(shared);
                match setup() {
                    Ok(()) => run(number, vcpu, handler, &ended.0, &report),
                    Err(e) => report(MachineEvent::Fault(format!("cannot confine a vCPU's thread: {e}"))),
                }
            })?;
            this.threads.push(thread);
        }
        Ok(this)
    }

    fn want(&self, wanted: Wanted) {
        self.shared.lock().wanted = wanted;
        self.shared.changed.notify_all();
    }

    /// Takes all vCPUs out of the guest and returns when they are. `called` runs when none goes on there any more,
    /// though some may still wait for something outside.
    pub fn pause(&self, called: impl FnOnce()) {
        self.want(Wanted::Pause);
        self.kick();
        called();
        let mut state = self.shared.lock();
        while state.resting < self.threads.len() {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The states of paused vCPUs, by number.
    ///
    /// # Errors
    /// If one cannot be read, or has ended.
    pub fn save(&self) -> Result<Vec<VcpuState>, hypervisor::Error> {
        let ended = || hypervisor::Error::Operation {
            what: "read a vCPU that has stopped",
            source: io::ErrorKind::NotFound.into(),
        };
        let mut state = self.shared.lock();
        // Threads that have only just begun are not there yet.
        while state.resting < self.threads.len() {
            state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.vcpus.iter().map(|vcpu| vcpu.as_ref().ok_or_else(ended)?.save()).collect()
    }

    fn kick(&self) {
        for thread in &self.threads {
            // A thread that has ended needs no kick.
            let _ = thread.kill(kick_signal());
        }
    }

    /// Lets the vCPUs run.
    pub fn run(&self) {
        self.want(Wanted::Run);
    }

    /// Ends all vCPU threads; `called` as in [`Vcpus::pause`].
    pub fn stop(&mut self, called: impl FnOnce()) {
        self.want(Wanted::Stop);
        self.kick();
        called();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a vCPU's thread panicked");
            }
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.stop(|| {});
    }
}

/// A vCPU's thread.
fn run(number: usize, mut vcpu: Box<dyn Vcpu>, mut handler: Handler, shared: &Shared, report: &Report) {
    let mut handled = false;
    loop {
        if shared.lock().wanted != Wanted::Run {
            if handled && let Err(e) = vcpu.complete_access(&mut handler) {
                report(MachineEvent::Fault(e.to_string()));
            }
            handled = false;
            vcpu.notify_paused();
            match shared.rest(number, vcpu) {
                Some(back) => vcpu = back,
                None => return,
            }
        }
        let event = match vcpu.run(&mut handler) {
            Ok(Exit::Handled) => {
                handled = true;
                continue;
            }
            Ok(Exit::Interrupted) => continue,
            Ok(Exit::Halted) => MachineEvent::Fault("a vCPU halted for ever".into()),
            Ok(Exit::Reset) => MachineEvent::Reset,
            Ok(Exit::Fault(why)) => MachineEvent::Fault(why),
            Err(e) => MachineEvent::Fault(e.to_string()),
        };
        report(event);
        // Nothing more to run: wait to be stopped.
        shared.rest_for_good();
        return;
    }
}
