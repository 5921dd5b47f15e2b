//! How a guest offers its session bus to the portals of the host: the protocol of Spectrum OS's xdg-desktop-portal-spectrum,
//! so that its guests and its hosts fit ours.
//!
//! The guest connects to the host (CID 2) on [`PORT`] and sends the number of versions it speaks and each of them, one byte
//! each. The host answers with the one it chooses. Then, in version 1, the guest sends an [`Offer`], and the host one byte: 0 if it
//! takes it. The host connects to the guest's port that was offered, as often as it wants to, and finds the bus there: it speaks
//! D-Bus, and authenticates itself as ANONYMOUS. It takes the name `org.freedesktop.impl.portal.desktop.spectrum` on the bus, and
//! answers what the guest's xdg-desktop-portal asks its back-end.

use std::io::{self, Read};

/// The vsock port of the host.
pub const PORT: u32 = 219;

/// The version described here.
pub const VERSION: u8 = 1;

/// Longest path that is taken, in bytes: PATH_MAX of Linux.
const LONGEST_ROOT: usize = 4096;

/// Where a guest's bus is, and its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The vsock port of the guest by which its bus is reached.
    pub port: u32,
    /// The absolute path at which the guest sees what it is granted.
    pub root: String,
}

/// Why an offer is none.
#[derive(Debug, thiserror::Error)]
pub enum OfferError {
    /// It did not arrive.
    #[error("the guest's offer of its session bus did not arrive: {0}")]
    Io(#[from] io::Error),
    /// The guest is too new or too old.
    #[error("the guest speaks none of the versions of the portal protocol that are known ({VERSION})")]
    Version,
    /// Its path is none.
    #[error("the guest's path for what it is granted is not absolute, not UTF-8 or longer than {LONGEST_ROOT} bytes")]
    Root,
}

impl Offer {
    /// What a guest sends first: the versions it speaks.
    #[must_use]
    pub fn versions() -> [u8; 2] {
        [1, VERSION]
    }

    /// Reads the versions that a guest speaks. The host's answer is [`VERSION`].
    ///
    /// # Errors
    /// It is not among them, or they do not arrive.
    pub fn read_versions(from: &mut impl Read) -> Result<(), OfferError> {
        let mut count = [0];
        from.read_exact(&mut count)?;
        let mut versions = vec![0; usize::from(u8::from_be_bytes(count))];
        from.read_exact(&mut versions)?;
        if versions.contains(&VERSION) { Ok(()) } else { Err(OfferError::Version) }
    }

    /// What a guest sends when the version is chosen. Numbers are big-endian.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let length = u32::try_from(self.root.len()).unwrap_or(u32::MAX);
        [&self.port.to_be_bytes()[..], &length.to_be_bytes(), self.root.as_bytes()].concat()
    }

    /// Reads what [`Offer::encode`] made, or whatever a hostile guest sent.
    ///
    /// # Errors
    /// It does not arrive, or its path is none.
    pub fn read(from: &mut impl Read) -> Result<Self, OfferError> {
        let mut number = || {
            let mut bytes = [0; 4];
            from.read_exact(&mut bytes).map(|()| u32::from_be_bytes(bytes))
        };
        let (port, length) = (number()?, number()?);
        let length = usize::try_from(length).ok().filter(|length| *length <= LONGEST_ROOT).ok_or(OfferError::Root)?;
        let mut root = vec![0; length];
        from.read_exact(&mut root)?;
        let root = String::from_utf8(root).map_err(|_| OfferError::Root)?;
        if root.starts_with('/') && !root.contains('\0') { Ok(Self { port, root }) } else { Err(OfferError::Root) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn as_spectrums_guests_send_it() {
        let sent = b"\x01\x01\x00\x00\x00\xdb\x00\x00\x00\x05/host";
        let mut rest = &sent[..];
        Offer::read_versions(&mut rest).unwrap();
        let offer = Offer::read(&mut rest).unwrap();
        assert_eq!(offer, Offer { port: 219, root: "/host".into() });
        assert_eq!([&Offer::versions()[..], &offer.encode()].concat(), sent);
    }

    #[test]
    fn what_is_no_offer_is_refused() {
        let versions = |mut bytes: &[u8]| Offer::read_versions(&mut bytes);
        assert!(versions(&[3, 7, 1, 9]).is_ok());
        assert!(matches!(versions(&[0]), Err(OfferError::Version)));
        assert!(matches!(versions(&[2, 0, 2]), Err(OfferError::Version)));
        assert!(matches!(versions(&[2, 1]), Err(OfferError::Io(_))));
        let offer =
            |length: u32, root: &[u8]| Offer::read(&mut &[&[0, 0, 0, 1], &length.to_be_bytes()[..], root].concat()[..]);
        assert!(offer(2, b"/a").is_ok());
        for (length, root) in
            [(4097, &[b'/'; 4097][..]), (u32::MAX, b"/"), (1, b"a"), (0, b""), (2, b"/\xff"), (2, b"/\0")]
        {
            assert!(matches!(offer(length, root), Err(OfferError::Root)), "{length} {root:?}");
        }
        assert!(matches!(offer(3, b"/a"), Err(OfferError::Io(_))));
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_harmless(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut rest = &bytes[..];
            if Offer::read_versions(&mut rest).is_ok() {
                let _ = Offer::read(&mut rest);
            }
        }
    }
}
