//! Text that comes out of a process, collected while it runs.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

#[derive(Default)]
struct State {
    text: String,
    ended: bool,
}

/// A stream's text so far. A thread of its own reads it, so that the writer never waits.
pub struct Output {
    shared: Arc<(Mutex<State>, Condvar)>,
    /// Up to where [`Output::wait_for`] has looked.
    seen: usize,
}

impl Output {
    /// Collects `stream` until its end.
    pub fn collect(mut stream: impl Read + Send + 'static) -> Self {
        let shared = Arc::new((Mutex::new(State::default()), Condvar::new()));
        let ours = shared.clone();
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            loop {
                // A pseudo-terminal nobody has open any more reads as an error.
                let n = stream.read(&mut chunk).unwrap_or(0);
                let mut state = ours.0.lock().unwrap_or_else(PoisonError::into_inner);
                state.text.push_str(&String::from_utf8_lossy(chunk.get(..n).unwrap_or_default()));
                state.ended = n == 0;
                ours.1.notify_all();
                if state.ended {
                    return;
                }
            }
        });
        Self { shared, seen: 0 }
    }

    /// Everything so far.
    #[must_use]
    pub fn text(&self) -> String {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner).text.clone()
    }

    /// Waits until a whole line contains `wanted`, and returns that line without its end. Each line is found once: the
    /// next call begins behind it.
    ///
    /// # Errors
    /// The stream ended first, or `timeout` passed.
    pub fn wait_for(&mut self, wanted: &str, timeout: Duration) -> Result<String, String> {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut searched = self.seen;
        loop {
            let new = state.text.get(searched..).unwrap_or_default();
            if let Some((end, line)) = find_line(new, wanted) {
                self.seen = searched + end;
                return Ok(line);
            }
            searched += new.rfind('\n').map_or(0, |end| end + 1);
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                let why = if state.ended { "the output ended" } else { "nothing more came in time" };
                return Err(format!("{why}, without {wanted:?}, after:\n{}", tail(&state.text)));
            }
            state = self.shared.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for the end of the stream and returns all of its text.
    ///
    /// # Errors
    /// `timeout` passed.
    pub fn wait_end(&mut self, timeout: Duration) -> Result<String, String> {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        while !state.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("the output did not end after:\n{}", tail(&state.text)));
            }
            state = self.shared.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(state.text.clone())
    }
}

/// The end of a text: enough to see what happened.
fn tail(text: &str) -> &str {
    let from = text.char_indices().rev().nth(4000).map_or(0, |(at, _)| at);
    text.get(from..).unwrap_or_default()
}

/// The first whole line with `wanted` in it: where it ends, and the line.
fn find_line(text: &str, wanted: &str) -> Option<(usize, String)> {
    let mut end = 0;
    for line in text.split_inclusive('\n') {
        end += line.len();
        if line.ends_with('\n') && line.contains(wanted) {
            return Some((end, line.trim_end().to_owned()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_once_and_only_when_they_are_whole() {
        let mut output = Output::collect(&b"one\ntwo 1\r\ntwo 2\ntwo"[..]);
        let second = Duration::from_secs(1);
        assert_eq!(output.wait_for("two", second).unwrap(), "two 1");
        assert_eq!(output.wait_for("two", second).unwrap(), "two 2");
        assert!(output.wait_for("two", second).unwrap_err().starts_with("the output ended"));
        assert_eq!(output.wait_end(second).unwrap(), "one\ntwo 1\r\ntwo 2\ntwo");
    }
}
