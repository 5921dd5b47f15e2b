//! A real HTTP client on the API.

use std::path::Path;
use std::process::Command;

/// An answer: status and body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// HTTP status; 0 if there was no answer.
    pub status: u16,
    /// The body as it came.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    ///
    /// # Panics
    /// If it is none.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e} in {:?}", self.body))
    }
}

/// Asks `name` (such as `vm.info`) of the VMM at `socket`; `body` is sent as JSON.
///
/// # Panics
/// If curl cannot be run.
#[must_use]
pub fn ask(socket: &Path, method: &str, name: &str, body: Option<&str>) -> Answer {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--max-time", "120", "--write-out", "\n%{http_code}", "--request", method]);
    curl.arg("--unix-socket").arg(socket);
    if let Some(body) = body {
        curl.args(["--header", "Content-Type: application/json", "--data", body]);
    }
    let output = curl.arg(format!("http://localhost/api/v1/{name}")).output().expect("curl can be run");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let (body, status) = text.rsplit_once('\n').unwrap_or(("", "0"));
    Answer { status: status.parse().unwrap_or(0), body: body.to_owned() }
}
