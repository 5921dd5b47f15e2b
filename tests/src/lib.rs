//! What whole-VM tests share: they start the programs as a user does and watch what comes out.
//!
//! * [`VmmCommand`] describes a `spectrum-vmm` process, [`Vmm`] is one that runs: wait for its text, type into it, signal
//!   it, ask its API. It is killed when it goes out of scope.
//! * [`Initramfs`] makes the image a guest boots: `guest-probe` as its first process, which does the jobs named on the
//!   kernel command line and prints what came of them; or any other program.
//! * [`tiny`] is a guest of a few bytes for tests that need a running machine and no Linux.
//! * [`desktop`] is a headless compositor, and applications in VMs of their own on it.
//! * [`session`] is a session bus of the host, with the desktop's portals, and [`dialog`] is what they show.
//! * [`place`] is where `spectrum` keeps its templates and VMs, for one test.
//! * [`shell`] is a guest that does what is typed.
//! * [`agent`] is a VM of the template whose agent the test speaks to itself.
//! * [`zygote`] makes clones, and ends them.
//! * [`journal`] is a file that a guest writes and the host checks.
//! * [`curl`] asks the API as people do by hand.
//!
//! Nothing here sleeps and hopes: every wait is for text, for the end of a process or for an answer, with a time-out that only a
//! hang reaches ([`TIMEOUT`]). Where nothing tells of what is waited for, it is looked for again and again.

pub mod agent;
pub mod curl;
pub mod desktop;
pub mod dialog;
mod initramfs;
pub mod journal;
mod output;
pub mod place;
pub mod programs;
pub mod session;
pub mod shell;
pub mod tiny;
mod vmm;
pub mod zygote;

use std::time::Duration;

pub use initramfs::Initramfs;
pub use output::Output;
pub use vmm::{Ended, Terminal, Vmm, VmmCommand};

/// How long anything may take before it counts as hanging: a boot on an emulated machine takes a tenth of it.
pub const TIMEOUT: Duration = Duration::from_secs(400);
