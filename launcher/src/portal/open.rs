//! Addresses that the desktop opens: what the VM's applications have for http, https and mailto is the back-end itself.
//!
//! The portals' OpenURI has no back-end of its own: the VM's xdg-desktop-portal starts the program that is registered for a scheme, and
//! `spectrum-guest` registers one that calls the method OpenURI here.

use zbus::zvariant::{DeserializeDict, SerializeDict, Type};

use super::{
    Portals,
    desktop::{Answer, Desktop, DesktopError, TOKEN},
};
use crate::policy::Service;

/// The interface of the method, which is our own.
pub const INTERFACE: &str = "org.freedesktop.impl.portal.desktop.spectrum";

/// The desktop's.
const DESKTOP: &str = "org.freedesktop.portal.OpenURI";

/// What may be opened.
const SCHEMES: [&str; 3] = ["http:", "https:", "mailto:"];

/// Longest address, in bytes.
const LONGEST: usize = 8192;

#[derive(SerializeDict, Type)]
#[zvariant(signature = "dict")]
struct Options {
    handle_token: String,
}

#[derive(DeserializeDict, Type)]
#[zvariant(signature = "dict")]
struct Results {}

/// Why it is not opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Desktop(#[from] DesktopError),
    #[error("{0:?} is no address that may be opened: http, https and mailto may be")]
    Address(String),
    #[error("the policy does not allow {0}")]
    Denied(String),
    #[error("the desktop did not open it")]
    NotOpened,
}

/// Lets the desktop open `uri`, if the policy allows it.
pub fn open(portals: &Portals, desktop: &Desktop, uri: &str) -> Result<(), OpenError> {
    let uri = checked(uri).ok_or_else(|| OpenError::Address(uri.chars().take(100).collect()))?;
    if !portals.point.decide(Service::OpenUrl, &uri).allowed {
        return Err(OpenError::Denied(uri));
    }
    let options = Options { handle_token: TOKEN.into() };
    // The guest's handler of addresses is not told whose window it was.
    match desktop.request::<Results>(DESKTOP, "OpenURI", "", &uri, &options)? {
        Answer::Done(_) | Answer::Cancelled => Ok(()),
        Answer::Other => Err(OpenError::NotOpened),
    }
}

/// The address with its scheme in small letters, as rules of the policy have it; nothing if it is none (RFC 3986 has graphic
/// characters of ASCII only).
fn checked(uri: &str) -> Option<String> {
    let (scheme, rest) = uri.split_at_checked(uri.find(':')?.checked_add(1)?)?;
    let scheme = scheme.to_ascii_lowercase();
    let right = uri.len() <= LONGEST
        && uri.chars().all(|c| c.is_ascii_graphic())
        && SCHEMES.contains(&scheme.as_str())
        && (scheme == "mailto:" || rest.starts_with("//"));
    right.then(|| scheme + rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_known_schemes() {
        for uri in ["http://a/", "https://x.org/?q=%20#a", "mailto:me@x.org"] {
            assert_eq!(checked(uri).as_deref(), Some(uri));
        }
        assert_eq!(checked("HTTPS://X.org/").as_deref(), Some("https://X.org/"));
        let long = format!("http://{}", "a".repeat(LONGEST));
        for uri in [
            "",
            "http",
            "file:///etc/passwd",
            "javascript:1",
            "http:x",
            "http://a b",
            "http://a\n",
            "http://\u{e4}",
            &long,
        ] {
            assert_eq!(checked(uri), None, "{uri}");
        }
    }
}
