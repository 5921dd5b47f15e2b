//! Programs that show one question: for desktops without a portal back-end.

use std::{
    env, io,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use rustix::process::Signal;

use super::{Answer, Question};
use crate::run::process::Running;

/// Why a program did not ask.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// It could not be started or watched.
    #[error("cannot run {path}: {source}")]
    Start {
        /// The program.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It gave no answer, but a failure.
    #[error("{0} could not show the question")]
    Failed(PathBuf),
}

/// How a program is told what to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Zenity,
    Kdialog,
}

/// A program that shows a question.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    kind: Kind,
}

/// The first one there is in PATH; none without a display, where they would fail with the status that means no.
pub fn find() -> Option<Program> {
    if ["WAYLAND_DISPLAY", "DISPLAY"].into_iter().all(|name| env::var_os(name).is_none()) {
        return None;
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let known = [("zenity", Kind::Zenity), ("kdialog", Kind::Kdialog)];
    known.into_iter().find_map(|(name, kind)| {
        let path = env::split_paths(&path).map(|folder| folder.join(name)).find(|path| path.is_file())?;
        Some(Program { path, kind })
    })
}

impl Program {
    /// Asks, and ends the program when it is too late.
    pub fn ask(&self, question: &Question, time: Duration) -> Result<Answer, ProgramError> {
        let fail = |source| ProgramError::Start { path: self.path.clone(), source };
        let mut command = Command::new(&self.path);
        command.args(arguments(self.kind, question)).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(fail)?;
        let in_time = Running::open(child.id()).map(|running| {
            let in_time = running.wait(time);
            if !in_time {
                running.signal(Signal::KILL);
            }
            in_time
        });
        let in_time = in_time.inspect_err(|_| drop(child.kill())).map_err(fail);
        let status = child.wait().map_err(fail)?;
        match (in_time?, status.code()) {
            (false, _) => Ok(Answer::None),
            (true, Some(0)) => Ok(Answer::Once),
            (true, Some(1)) => Ok(Answer::No),
            (true, _) => Err(ProgramError::Failed(self.path.clone())),
        }
    }
}

fn arguments(kind: Kind, Question { title, details, end }: &Question) -> Vec<String> {
    let text = format!("{title}\n\n{details}\n\n{end}");
    let words: &[&str] = match kind {
        Kind::Zenity => &[
            "--question",
            "--no-markup",
            "--default-cancel",
            "--ok-label",
            "Allow",
            "--cancel-label",
            "Deny",
            "--title",
            title,
            "--text",
            &text,
        ],
        Kind::Kdialog => &["--title", title, "--yes-label", "Allow", "--no-label", "Deny", "--yesno", &text],
    };
    words.iter().map(|word| (*word).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn status_and_time_are_the_answer() {
        let folder = tempfile::tempdir().unwrap();
        let question = Question { title: "May it?".into(), details: "App: a".into(), end: "No.".into() };
        let ask = |script: &str, time| {
            let path = folder.path().join("zenity");
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
            Program { path, kind: Kind::Zenity }.ask(&question, Duration::from_secs(time))
        };
        let shown = "case \"$*\" in *--no-markup*--default-cancel*'May it?'*'App: a'*) exit 0;; esac; exit 1";
        assert_eq!(ask(shown, 60).unwrap(), Answer::Once);
        assert_eq!(ask("exit 1", 60).unwrap(), Answer::No);
        assert_eq!(ask("exec sleep 1000", 0).unwrap(), Answer::None);
        assert!(matches!(ask("exit 255", 60), Err(ProgramError::Failed(_))));
        let missing = Program { path: folder.path().join("none"), kind: Kind::Kdialog };
        assert!(matches!(missing.ask(&question, Duration::ZERO), Err(ProgramError::Start { .. })));
    }
}
