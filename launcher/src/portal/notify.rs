//! Notifications: org.freedesktop.impl.portal.Notification, shown by the desktop's org.freedesktop.portal.Notification.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use zbus::zvariant::{DeserializeDict, SerializeDict, Type};

use super::{
    Portals,
    desktop::{Desktop, DesktopError},
    text::{shown, title},
};
use crate::policy::Service;

/// The interface of the back-end.
pub const INTERFACE: &str = "org.freedesktop.impl.portal.Notification";

/// The desktop's.
pub const DESKTOP: &str = "org.freedesktop.portal.Notification";

/// What the policy knows as target: a notification is for nobody in particular.
const TARGET: &str = "-";

const MOST_BUTTONS: usize = 8;
const PRIORITIES: [&str; 4] = ["low", "normal", "high", "urgent"];

/// Longest identifier, in bytes.
const LONGEST_ID: usize = 200;

/// Notifications of one VM that are shown at once; one more may follow each time this has passed.
const AT_ONCE: u32 = 10;
const EVERY: Duration = Duration::from_secs(2);

/// What is known of a notification. Pictures and the targets of actions are left out.
#[derive(Debug, Default, PartialEq, DeserializeDict, SerializeDict, Type)]
#[zvariant(signature = "dict")]
pub struct Notification {
    title: Option<String>,
    body: Option<String>,
    priority: Option<String>,
    #[zvariant(rename = "default-action")]
    default_action: Option<String>,
    buttons: Option<Vec<Button>>,
}

#[derive(Debug, Default, PartialEq, DeserializeDict, SerializeDict, Type)]
#[zvariant(signature = "dict")]
struct Button {
    label: Option<String>,
    action: Option<String>,
}

/// Why it is not shown.
#[derive(Debug, thiserror::Error)]
pub enum NotifyError {
    #[error(transparent)]
    Desktop(#[from] DesktopError),
    #[error("the policy does not allow notifications")]
    Denied,
    #[error("its identifier is none, or longer than {LONGEST_ID} bytes")]
    Id,
    #[error("a VM shows at most {AT_ONCE} notifications at once, and one every {} s after them", EVERY.as_secs())]
    TooMany,
}

/// How many notifications of one VM are shown in a time. What is more is dropped: shown later it would be in the way of others.
#[derive(Debug)]
pub struct Limit(Mutex<Shown>);

/// What was shown before.
#[derive(Debug)]
struct Shown {
    /// When it is as if none had been shown.
    over: Instant,
    /// Whether one was dropped since it was as if none had been shown.
    dropping: bool,
}

impl Limit {
    /// None was shown yet.
    pub fn new() -> Self {
        Self(Mutex::new(Shown { over: Instant::now(), dropping: false }))
    }

    /// Counts a notification of `app`, which may be shown unless it is an error. The first of many that may not is told to the user.
    pub fn admit(&self, app: &str) -> Result<(), NotifyError> {
        let mut shown = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match shown.admit(Instant::now()) {
            Admission::Shown => return Ok(()),
            Admission::FirstDropped => log::warn!("{app}: notifications are dropped: {}", NotifyError::TooMany),
            Admission::Dropped => {}
        }
        Err(NotifyError::TooMany)
    }
}

/// What becomes of a notification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Admission {
    Shown,
    /// Dropped, as the first of a burst.
    FirstDropped,
    Dropped,
}

impl Shown {
    fn admit(&mut self, now: Instant) -> Admission {
        let wait = self.over.saturating_duration_since(now);
        if wait.is_zero() {
            self.dropping = false;
        }
        if wait <= EVERY * (AT_ONCE - 1) {
            self.over = now + wait + EVERY;
            Admission::Shown
        } else if std::mem::replace(&mut self.dropping, true) {
            Admission::Dropped
        } else {
            Admission::FirstDropped
        }
    }
}

impl Notification {
    fn checked(self, app: &str) -> Self {
        let buttons = self.buttons.unwrap_or_default().into_iter().filter(|one| one.action.is_some());
        let button = |one: Button| Button { label: one.label.map(|label| shown(&label)), action: one.action };
        let buttons: Vec<_> = buttons.take(MOST_BUTTONS).map(button).collect();
        Self {
            title: Some(title(app, &self.title.unwrap_or_default())),
            body: self.body.map(|body| shown(&body)),
            priority: self.priority.filter(|priority| PRIORITIES.contains(&priority.as_str())),
            default_action: self.default_action,
            buttons: Some(buttons).filter(|all| !all.is_empty()),
        }
    }
}

/// What the desktop knows a notification by. VMs are one application for it, so it has the launcher's process in it.
fn id_for_desktop(app_id: &str, id: &str) -> Result<String, NotifyError> {
    if app_id.len() + id.len() > LONGEST_ID || app_id.contains('/') {
        return Err(NotifyError::Id);
    }
    Ok(format!("{}/{app_id}/{id}", std::process::id()))
}

/// The guest's application, and its name for the notification.
pub fn ids_for_guest(id: &str) -> Option<(&str, &str)> {
    let (process, id) = id.split_once('/')?;
    if process == std::process::id().to_string() { id.split_once('/') } else { None }
}

/// Shows one.
pub fn add(
    portals: &Portals,
    desktop: &Desktop,
    (app_id, id): (&str, &str),
    notification: Notification,
) -> Result<(), NotifyError> {
    if !portals.point.decide(Service::Notify, TARGET).allowed {
        return Err(NotifyError::Denied);
    }
    let body = (id_for_desktop(app_id, id)?, notification.checked(portals.app()));
    desktop.call(DESKTOP, "AddNotification", &body)?;
    Ok(())
}

/// Takes one back.
pub fn remove(desktop: &Desktop, (app_id, id): (&str, &str)) -> Result<(), NotifyError> {
    desktop.call(DESKTOP, "RemoveNotification", &id_for_desktop(app_id, id)?)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_in_a_time_and_no_more() {
        let start = Instant::now();
        let mut shown = Shown { over: start, dropping: false };
        // How many of so many are shown, and lines about others.
        let mut admit = |count: usize, seconds: f64| {
            let now = start + Duration::from_secs_f64(seconds);
            let all: Vec<Admission> = (0..count).map(|_| shown.admit(now)).collect();
            [Admission::Shown, Admission::FirstDropped].map(|kind| all.iter().filter(|one| **one == kind).count())
        };
        assert_eq!(admit(10, 0.0), [10, 0]);
        // Those that are dropped do not put off the next.
        assert_eq!(admit(1000, 0.0), [0, 1]);
        assert_eq!(admit(1000, 1.9), [0, 0]);
        assert_eq!(admit(1000, 2.0), [1, 0]);
        assert_eq!(admit(1000, 3.9), [0, 0]);
        assert_eq!(admit(5, 8.5), [3, 0]);
        // It is one burst until there can be as many at once again.
        assert_eq!(admit(1000, 27.9), [9, 0]);
        assert_eq!(admit(1000, 48.0), [10, 1]);
        // However long none came.
        assert_eq!(admit(1000, 10_000.0), [10, 1]);
    }

    #[test]
    fn whose_it_is_is_said_and_nothing_unknown_is_passed_on() {
        let text = |text: &str| Some(text.to_owned());
        let buttons = (0..20).map(|_| Button { label: text("A\nB"), action: text("a") });
        let asked = Notification {
            title: text("\u{202e}new"),
            body: text(&"x".repeat(100_000)),
            priority: text("highest"),
            default_action: text("open"),
            buttons: Some(buttons.chain([Button::default()]).collect()),
        };
        let checked = asked.checked("mail");
        assert_eq!((checked.title.as_deref(), &checked.priority), (Some("[mail] new"), &None));
        assert!(checked.body.unwrap().len() < 1000);
        let buttons = checked.buttons.unwrap();
        assert!(buttons.len() == MOST_BUTTONS && buttons.iter().all(|one| one.label.as_deref() == Some("AB")));
        assert_eq!(ids_for_guest(&id_for_desktop("x.Y", "a/b").unwrap()), Some(("x.Y", "a/b")));
        assert_eq!(ids_for_guest("1/a/b"), None);
        assert!(id_for_desktop("", &"i".repeat(201)).is_err() && id_for_desktop("a/b", "").is_err());
    }
}
