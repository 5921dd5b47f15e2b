//! Tells the user what a long job is doing, and how long each step took.

use std::time::Instant;

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
        eprintln!("[{}/{}] {what}", self.step, self.steps);
    }

    /// Something worth telling inside a step.
    pub fn note(&self, what: &str) {
        eprintln!("      {what}");
    }

    /// The step is over.
    fn done(&mut self) {
        if let Some(started) = self.step_started.take() {
            eprintln!("      {:.1} s", started.elapsed().as_secs_f64());
        }
    }

    /// The job is over.
    pub fn finish(mut self, what: &str) {
        self.done();
        eprintln!("{what} ({:.1} s)", self.started.elapsed().as_secs_f64());
    }
}
