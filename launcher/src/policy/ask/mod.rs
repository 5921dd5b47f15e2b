//! Questions to the user, in a dialog of the host's desktop.

mod portal;
mod programs;
mod text;

use std::time::Duration;

use super::rules::Service;

/// Why nobody could be asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// There is no session bus, or nobody on it who shows questions.
    #[error("{0}")]
    Portal(#[from] portal::PortalError),
    /// A program that shows questions failed.
    #[error("{0}")]
    Program(#[from] programs::ProgramError),
    /// There is no way to ask.
    #[error(
        "the desktop shows no questions ({0}), and there is neither zenity nor kdialog in PATH, or no display: install one, or a \
         portal back-end such as xdg-desktop-portal-gtk"
    )]
    Nobody(portal::PortalError),
}

/// What the user said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Yes, this once.
    Once,
    /// Yes, and the same again until the VM ends.
    UntilItEnds,
    /// No.
    No,
    /// Nothing in time.
    None,
}

/// A question as it is shown. What an application chose of it can neither look like another part of it nor hide one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// One line.
    pub title: String,
    /// App, service and target, a line each.
    pub details: String,
    /// What happens without an answer.
    pub end: String,
}

impl Question {
    /// May `app` have `service` of `target`?
    pub fn new(app: &str, service: Service, target: &str, time: Duration) -> Self {
        let wish = match service {
            Service::Files => "use a file",
            Service::Clipboard => "use the clipboard",
            Service::OpenUrl => "open an address",
            Service::Notify => "show a notification",
            Service::Network => "use the network",
            Service::Sound => "play sound",
            Service::Microphone => "use the microphone",
            Service::Camera => "use the camera",
            Service::Exec => "use a service of another app",
        };
        let app = text::shown(app);
        Self {
            title: format!("May the VM of {app} {wish}?"),
            details: format!("App: {app}\nService: {service}\nTarget: \u{201c}{}\u{201d}", text::shown(target)),
            end: format!("Without an answer in {} s it may not.", time.as_secs()),
        }
    }
}

/// Somebody who asks the user.
pub trait Ask: Send + Sync {
    /// Asks, and waits at most `time` for the answer. Afterwards the question is no longer there.
    fn ask(&self, question: &Question, time: Duration) -> Result<Answer, AskError>;
}

/// The desktop of the session this process belongs to.
#[derive(Debug)]
pub struct Desktop;

impl Ask for Desktop {
    fn ask(&self, question: &Question, time: Duration) -> Result<Answer, AskError> {
        match portal::ask(question, time) {
            // Nothing was shown.
            Err(error) => match programs::find() {
                Some(program) => Ok(program.ask(question, time)?),
                None => Err(AskError::Nobody(error)),
            },
            Ok(answer) => Ok(answer),
        }
    }
}
