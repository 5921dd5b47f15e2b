//! Tells the user what a long job is doing, and how long each step took.

use std::{
    fs,
    path::Path,
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// How often a bar is drawn anew.
const OFTEN: Duration = Duration::from_millis(100);

/// A bar where it is not known how much there is to do, and where it is: bytes.
const UNKNOWN: &str = "      {spinner} {elapsed} {wide_msg}";
const BYTES: &str = "      {msg} [{wide_bar}] {binary_bytes}/{binary_total_bytes} {elapsed}";

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

/// What is seen of work while it lasts. There is none unless messages go to a terminal that can clear a line, and are wanted.
#[derive(Debug)]
pub struct Bar(Option<ProgressBar>);

impl Bar {
    /// Nothing is seen until some work begins.
    pub fn new() -> Self {
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        bar.finish_and_clear();
        Self(Some(bar).filter(|bar| !is_quiet() && !bar.is_hidden()))
    }

    /// Work begins of which it is not known how much there is.
    pub fn begin(&self, what: &str) {
        self.show(UNKNOWN, what, None);
    }

    /// Work on so many bytes begins.
    pub fn begin_bytes(&self, what: &str, bytes: u64) {
        self.show(BYTES, what, Some(bytes));
    }

    /// So many more bytes are done.
    pub fn advance(&self, bytes: u64) {
        if let Some(bar) = &self.0 {
            bar.inc(bytes);
        }
    }

    /// Does `work`, which writes `file`, of about so many bytes.
    pub fn writing<R>(&self, file: &Path, bytes: u64, work: impl FnOnce() -> R) -> R {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        self.begin_bytes(&format!("writing {name}"), bytes);
        let Some(bar) = &self.0 else { return work() };
        thread::scope(|scope| {
            let (working, ended) = mpsc::channel::<()>();
            let watch = move || {
                while ended.recv_timeout(OFTEN) == Err(RecvTimeoutError::Timeout) {
                    bar.set_position(fs::metadata(file).map_or(0, |data| data.len()));
                }
            };
            // Without it the bar stands still.
            let _ = thread::Builder::new().name("progress".into()).spawn_scoped(scope, watch);
            let result = work();
            drop(working);
            result
        })
    }

    /// Nothing is seen until other work begins.
    fn end(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }

    fn show(&self, template: &str, what: &str, bytes: Option<u64>) {
        let Some(bar) = &self.0 else { return };
        // Not seen until it is as it shall be.
        bar.finish_and_clear();
        bar.set_style(style(template));
        match bytes {
            Some(bytes) => bar.set_length(bytes),
            None => bar.unset_length(),
        }
        bar.set_message(what.to_owned());
        bar.reset();
        bar.enable_steady_tick(OFTEN);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.end();
    }
}

/// ASCII, which every terminal has.
fn style(template: &str) -> ProgressStyle {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style.tick_chars("|/-\\ ").progress_chars("=> ")
}

/// The steps of one job.
#[derive(Debug)]
pub struct Progress {
    steps: u32,
    step: u32,
    started: Instant,
    step_started: Option<Instant>,
    bar: Bar,
}

impl Progress {
    /// A job of so many steps.
    pub fn new(steps: u32) -> Self {
        Self { steps, step: 0, started: Instant::now(), step_started: None, bar: Bar::new() }
    }

    /// The next step begins.
    pub fn step(&mut self, what: &str) {
        self.done();
        self.step += 1;
        self.step_started = Some(Instant::now());
        tell(&format!("[{}/{}] {what}", self.step, self.steps));
        self.bar.begin(what);
    }

    /// What is seen of the step.
    pub fn bar(&self) -> &Bar {
        &self.bar
    }

    /// Something worth telling inside a step.
    pub fn note(&self, what: &str) {
        let line = format!("      {what}");
        match &self.bar.0 {
            Some(bar) => bar.suspend(|| tell(&line)),
            None => tell(&line),
        }
    }

    /// Where a step is, which is worth telling until it is elsewhere.
    pub fn at(&self, what: &str) {
        match &self.bar.0 {
            Some(bar) => bar.set_message(what.to_owned()),
            None => self.note(what),
        }
    }

    /// The step is over.
    fn done(&mut self) {
        self.bar.end();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bars_can_be_drawn() {
        for template in [UNKNOWN, BYTES] {
            ProgressStyle::with_template(template).unwrap();
        }
    }

    #[test]
    fn work_is_done_with_and_without_a_bar() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        let hidden = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        for bar in [Bar(None), Bar(Some(hidden))] {
            assert_eq!(bar.writing(&file, 1, || fs::write(&file, "abc").map(|()| 7)).unwrap(), 7);
        }
    }
}
