//! The desktop's own portals, asked as any application asks them (org.freedesktop.portal.Desktop).

use std::time::Duration;

use serde::{Serialize, de::DeserializeOwned};
use zbus::{
    Message,
    blocking::{Connection, MessageIterator, connection::Builder, fdo::DBusProxy},
    message,
    zvariant::{DynamicType, OwnedObjectPath, Type},
};

/// How long it may take to be heard, which is not what a user takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// Who answers.
const NAME: &str = "org.freedesktop.portal.Desktop";
const PATH: &str = "/org/freedesktop/portal/desktop";
/// What an answer belongs to.
const REQUEST: &str = "org.freedesktop.portal.Request";

/// The last part of the names of requests. Each has a connection of its own, so one will do.
pub const TOKEN: &str = "spectrum";

/// Longest handle of a window, in bytes. wlroots' and KWin's have 36 and 38, mutter's 32.
const LONGEST_HANDLE: usize = 64;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum DesktopError {
    #[error("the desktop's portals cannot be asked: {0}")]
    Bus(#[from] zbus::Error),
    #[error("the desktop's portals cannot be asked: {0}")]
    Names(#[from] zbus::fdo::Error),
    #[error("the desktop's portals ended before they answered")]
    Gone,
    #[error("the request was withdrawn")]
    Withdrawn,
}

/// What the user did (the signal Response of org.freedesktop.portal.Request).
#[derive(Debug)]
pub enum Answer<R> {
    /// Agreed.
    Done(R),
    /// Did not want it.
    Cancelled,
    /// It ended in some other way.
    Other,
}

/// One question to the desktop. It is withdrawn when its connection ends.
#[derive(Clone, Debug)]
pub struct Desktop {
    connection: Connection,
}

impl Desktop {
    /// Connects to the session's bus.
    pub fn connect() -> Result<Self, DesktopError> {
        Ok(Self { connection: Builder::session()?.method_timeout(PATIENCE).build()? })
    }

    /// Calls `take` with each signal of the desktop's portals, until the connection ends.
    pub fn watch(&self, take: impl Fn(&Message)) -> Result<(), DesktopError> {
        let messages = MessageIterator::from(&self.connection);
        let rule = format!("type='signal',sender='{NAME}',path='{PATH}'");
        DBusProxy::new(&self.connection)?.add_match_rule(rule.as_str().try_into()?)?;
        for message in messages {
            let message = message?;
            if message.message_type() == message::Type::Signal {
                take(&message);
            }
        }
        Ok(())
    }

    /// Ends the connection, and with it the dialog, if there is one. Who waits for the answer is told.
    pub fn withdraw(self) {
        let _ = self.connection.close();
    }

    /// Calls a method that has no dialog.
    pub fn call<B>(&self, interface: &str, method: &str, body: &B) -> Result<Message, DesktopError>
    where
        B: Serialize + DynamicType,
    {
        Ok(self.connection.call_method(Some(NAME), PATH, Some(interface), method, body)?)
    }

    /// Calls a method that has a dialog, and waits for what the user does. `window` is what [`parent`] gives, or nothing, and `subject`
    /// the argument after it: a title, or what it is about. `options` have [`TOKEN`] as their handle_token.
    pub fn request<R>(
        &self,
        interface: &str,
        method: &str,
        window: &str,
        subject: &str,
        options: &(impl Serialize + Type),
    ) -> Result<Answer<R>, DesktopError>
    where
        R: DeserializeOwned + Type,
    {
        // From here on nothing is missed.
        let messages = MessageIterator::from(&self.connection);
        let bus = DBusProxy::new(&self.connection)?;
        let rule = format!("type='signal',member='NameOwnerChanged',arg0='{NAME}'");
        bus.add_match_rule(rule.as_str().try_into()?)?;
        let reply = self.call(interface, method, &(window, subject, options))?;
        let handle: OwnedObjectPath = reply.body().deserialize()?;
        for message in messages {
            let Ok(message) = message else { break };
            let header = message.header();
            if message.message_type() != message::Type::Signal {
                continue;
            }
            match header.member().map(|member| member.as_str()) {
                Some("Response")
                    if header.path() == Some(&*handle)
                        && header.interface().is_some_and(|interface| interface == REQUEST) =>
                {
                    let (response, results): (u32, R) = message.body().deserialize()?;
                    return Ok(match response {
                        0 => Answer::Done(results),
                        1 => Answer::Cancelled,
                        _ => Answer::Other,
                    });
                }
                Some("NameOwnerChanged") => {
                    let (name, old, _): (String, String, String) = message.body().deserialize()?;
                    if name == NAME && !old.is_empty() {
                        return Err(DesktopError::Gone);
                    }
                }
                _ => {}
            }
        }
        Err(DesktopError::Withdrawn)
    }
}

/// The window that a dialog belongs to, as a guest names it, if the desktop's compositor can have named it so; else none. wlroots and KWin
/// give UUIDs, KWin with braces, and mutter any printable ASCII.
pub fn parent(named: &str) -> &str {
    let handle = named.strip_prefix("wayland:").unwrap_or_default();
    let right = (1..=LONGEST_HANDLE).contains(&handle.len()) && handle.bytes().all(|byte| matches!(byte, b' '..=b'~'));
    if right { named } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_one_of_the_compositor_or_none() {
        let longest = format!("wayland:{}", "h".repeat(LONGEST_HANDLE));
        for window in [
            "wayland:0b3d6ff2-5f31-4d6c-8b6a-0f1d0c7f9a11",
            "wayland:{0b3d6ff2-5f31-4d6c-8b6a-0f1d0c7f9a11}",
            "wayland:k ~\"/:%$()<>\\'",
            &longest,
        ] {
            assert_eq!(parent(window), window);
        }
        let long = format!("{longest}h");
        for window in [
            "",
            "x11:",
            "x11:3a00007",
            "wayland",
            "wayland:",
            "Wayland:a",
            " wayland:a",
            "wayland:a\n",
            "wayland:\u{e4}",
            "wayland:a\u{7f}",
            &long,
        ] {
            assert_eq!(parent(window), "", "{window:?}");
        }
    }
}
