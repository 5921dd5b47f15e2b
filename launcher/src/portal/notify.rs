//! Notifications: org.freedesktop.impl.portal.Notification, shown by the desktop's org.freedesktop.portal.Notification.

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
