//! Runs the system's tools.

use std::{
    ffi::OsStr,
    io::{self, BufRead, BufReader, Write},
    process::{Command, Stdio},
    thread,
};

/// Lines of a tool's messages shown when it fails.
const SHOWN: usize = 12;

/// Why a tool did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It is not installed.
    #[error("{tool} is missing: install the Debian package {package}")]
    Missing {
        /// The tool.
        tool: String,
        /// The package that has it.
        package: &'static str,
    },
    /// It could not be started or talked to.
    #[error("cannot run {tool}: {source}")]
    Io {
        /// The tool.
        tool: String,
        /// The system's reason.
        source: io::Error,
    },
    /// It said no.
    #[error("{tool} failed ({status}):\n{messages}")]
    Failed {
        /// The tool.
        tool: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// The last of what it printed.
        messages: String,
    },
}

/// The Debian package each tool is in.
const PACKAGES: &[(&str, &str)] = &[
    ("apt-cache", "apt"),
    ("apt-get", "apt"),
    ("chroot", "coreutils"),
    ("depmod", "kmod"),
    ("dpkg", "dpkg"),
    ("dpkg-deb", "dpkg"),
    ("gzip", "gzip"),
    ("lz4", "lz4"),
    ("mkfs.erofs", "erofs-utils"),
    ("mmdebstrap", "mmdebstrap"),
    ("modprobe", "kmod"),
    ("unshare", "util-linux"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
];

/// A tool to be run, with a fixed locale so that what it prints can be read by us.
pub struct Tool {
    name: String,
    command: Command,
}

impl Tool {
    /// Names the tool. The folders of administration tools are searched too.
    pub fn new(name: &str) -> Self {
        let mut command = Command::new(name);
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{path}:/usr/sbin:/sbin")).env("LC_ALL", "C.UTF-8").stdin(Stdio::null());
        Self { name: name.to_owned(), command }
    }

    /// Adds one argument.
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.command.args(arguments);
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Runs in this folder.
    pub fn folder(mut self, folder: &std::path::Path) -> Self {
        self.command.current_dir(folder);
        self
    }

    /// Runs it to its end.
    pub fn run(self) -> Result<(), ToolError> {
        self.output().map(drop)
    }

    /// Runs it to its end and gives what it printed on standard output.
    pub fn text(self) -> Result<String, ToolError> {
        self.output().map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Runs it with `input` on its standard input and gives what it printed.
    pub fn filter(mut self, input: &[u8]) -> Result<Vec<u8>, ToolError> {
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.command.spawn().map_err(|source| self.error(source))?;
        let stdin = child.stdin.take();
        let output = thread::scope(|scope| {
            // A tool that stops reading tells why by its status.
            scope.spawn(move || stdin.map(|mut stdin| stdin.write_all(input)));
            child.wait_with_output()
        });
        let output = output.map_err(|source| self.error(source))?;
        self.check(output.status, &output.stderr)?;
        Ok(output.stdout)
    }

    /// Runs it to its end and passes each line it prints on standard error to `line`.
    pub fn watch(mut self, mut line: impl FnMut(&str)) -> Result<(), ToolError> {
        self.command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = self.command.spawn().map_err(|source| self.error(source))?;
        let mut last = std::collections::VecDeque::new();
        if let Some(stderr) = child.stderr.take() {
            for text in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
                let text = String::from_utf8_lossy(&text).into_owned();
                line(&text);
                last.push_back(text);
                if last.len() > SHOWN {
                    last.pop_front();
                }
            }
        }
        let status = child.wait().map_err(|source| self.error(source))?;
        let messages: Vec<String> = last.into();
        self.check(status, messages.join("\n").as_bytes())
    }

    fn output(mut self) -> Result<Vec<u8>, ToolError> {
        let output = self.command.output().map_err(|source| self.error(source))?;
        self.check(output.status, &output.stderr)?;
        Ok(output.stdout)
    }

    fn error(&self, source: io::Error) -> ToolError {
        let tool = self.name.clone();
        match PACKAGES.iter().find(|(name, _)| *name == tool) {
            Some((_, package)) if source.kind() == io::ErrorKind::NotFound => ToolError::Missing { tool, package },
            _ => ToolError::Io { tool, source },
        }
    }

    fn check(&self, status: std::process::ExitStatus, messages: &[u8]) -> Result<(), ToolError> {
        if status.success() {
            return Ok(());
        }
        let messages = String::from_utf8_lossy(messages);
        let lines: Vec<&str> = messages.lines().collect();
        let shown = lines.get(lines.len().saturating_sub(SHOWN)..).unwrap_or_default();
        Err(ToolError::Failed { tool: self.name.clone(), status, messages: shown.join("\n") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_status_and_messages() {
        assert_eq!(Tool::new("sh").args(["-c", "echo a; echo b >&2"]).text().unwrap(), "a\n");
        let error = Tool::new("sh").args(["-c", "echo first; echo why >&2; exit 3"]).run().unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.ends_with("why"), "{error}");
        let mut seen = Vec::new();
        Tool::new("sh").args(["-c", "echo x >&2; echo y >&2"]).watch(|line| seen.push(line.to_owned())).unwrap();
        assert_eq!(seen, ["x", "y"]);
    }

    #[test]
    fn a_filter_passes_more_than_a_pipe_holds() {
        let input = vec![b'z'; 1_000_000];
        assert_eq!(Tool::new("cat").filter(&input).unwrap(), input);
        assert!(Tool::new("false").filter(&input).is_err());
    }

    #[test]
    fn a_missing_tool_names_its_package() {
        let error = Tool::new("mkfs.erofs").env("PATH", "/nonexistent").run().unwrap_err();
        assert_eq!(error.to_string(), "mkfs.erofs is missing: install the Debian package erofs-utils");
    }
}
