//! Tells the user what a long job is doing, and how long each step took.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

/// Whether only what goes wrong is told.
static QUIET: AtomicBool = AtomicBool::new(false);

/// From here on only what goes wrong is told.
pub fn be_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// Whether only what goes wrong is told.
pub fn is_quiet() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// Tells it, unless only what goes wrong is told.
fn tell(text: &str) {
    if !is_quiet() {
        eprintln!("{text}");
    }
}

/// The steps of one job.
#[derive(Debug)]
pub struct Progress {
    steps: u32,
    step: u32,
    started: Instant,
    step_started: Option<Instant>,
}

impl Progress {
    /// A job of so many steps.
    pub fn new(steps: u32) -> Self {
        Self { steps, step: 0, started: Instant::now(), step_started: None }
    }

    /// The next step begins.
    pub fn step(&mut self, what: &str) {
        self.done();
        self.step += 1;
        self.step_started = Some(Instant::now());
        tell(&format!("[{}/{}] {what}", self.step, self.steps));
    }

    /// Something worth telling inside a step.
    pub fn note(&self, what: &str) {
        tell(&format!("      {what}"));
    }

    /// The step is over.
    fn done(&mut self) {
        if let Some(started) = self.step_started.take() {
            tell(&format!("      {:.1} s", started.elapsed().as_secs_f64()));
        }
    }

    /// The job is over.
    pub fn finish(mut self, what: &str) {
        self.done();
        tell(&format!("{what} ({:.1} s)", self.started.elapsed().as_secs_f64()));
    }
}
