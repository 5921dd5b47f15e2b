//! Between the guest's bus and the library that speaks D-Bus: no message is let through that is larger than what portals need.
//!
//! The library takes messages of up to 128 MiB, and queues them. Here they are measured by their fixed header ("Message Format"
//! in the D-Bus specification) before any of them is kept.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    thread,
};

/// Largest message that is let through, in bytes. A question of a file dialog with many file types has a few KiB, a picture of
/// a notification may have some hundred.
pub const LARGEST: usize = 512 * 1024;

/// Longest line of the authentication, in bytes.
const LONGEST_LINE: u64 = 1024;

/// Bytes of the header up to the length of its array of fields, which is the last of them.
const FIXED: usize = 16;

/// Puts a guard before `guest`. It ends with either side.
pub fn behind(guest: UnixStream) -> io::Result<UnixStream> {
    let (ours, other) = UnixStream::pair()?;
    let (to_guest, from_other) = (guest.try_clone()?, other.try_clone()?);
    thread::Builder::new().name("to the guest".into()).spawn(move || {
        let (mut from, mut to) = (from_other, to_guest);
        let _ = io::copy(&mut from, &mut to);
        end(&from, &to);
    })?;
    thread::Builder::new().name("from the guest".into()).spawn(move || {
        let mut to = other;
        let mut from = BufReader::new(&guest);
        if let Err(error) = pass(&mut from, &mut to) {
            log::warn!("the VM's bus is left: {error}");
        }
        end(&guest, &to);
    })?;
    Ok(ours)
}

fn end(one: &UnixStream, other: &UnixStream) {
    for stream in [one, other] {
        let _ = stream.shutdown(Shutdown::Both);
    }
}

/// Copies lines of the authentication, then messages, to the end.
fn pass(from: &mut impl BufRead, to: &mut impl Write) -> io::Result<()> {
    let too_large = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{what} is too large"));
    loop {
        match from.fill_buf()?.first() {
            None => return Ok(()),
            // How messages begin, and no line of a server's does.
            Some(b'l' | b'B') => break,
            Some(_) => {}
        }
        let mut line = Vec::new();
        from.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            return Err(too_large("a line of its authentication"));
        }
        to.write_all(&line)?;
    }
    while !from.fill_buf()?.is_empty() {
        let mut header = [0; FIXED];
        from.read_exact(&mut header)?;
        let rest = rest_of(&header).ok_or_else(|| too_large("a message of it"))?;
        let mut message = vec![0; FIXED + rest];
        if let Some((first, rest)) = message.split_first_chunk_mut::<FIXED>() {
            *first = header;
            from.read_exact(rest)?;
        }
        to.write_all(&message)?;
    }
    Ok(())
}

/// How many bytes follow this beginning of a message; nothing if they are too many.
fn rest_of(header: &[u8; FIXED]) -> Option<usize> {
    let [order, _, _, _, body @ .., _, _, _, _, f0, f1, f2, f3] = header;
    let [b0, b1, b2, b3] = *body;
    let number = |bytes: [u8; 4]| match order {
        b'l' => Some(u32::from_le_bytes(bytes)),
        b'B' => Some(u32::from_be_bytes(bytes)),
        _ => None,
    };
    let body = usize::try_from(number([b0, b1, b2, b3])?).ok()?;
    let fields = usize::try_from(number([*f0, *f1, *f2, *f3])?).ok()?;
    // The body begins at a multiple of 8.
    let rest = fields.checked_next_multiple_of(8)?.checked_add(body)?;
    (rest <= LARGEST - FIXED).then_some(rest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn passed(bytes: &[u8]) -> (io::Result<()>, Vec<u8>) {
        let mut out = Vec::new();
        // Small pieces, so that every border is met.
        let result = pass(&mut BufReader::with_capacity(3, bytes), &mut out);
        (result, out)
    }

    fn message(order: u8, body: u32, fields: u32) -> Vec<u8> {
        let number = |n: u32| if order == b'l' { n.to_le_bytes() } else { n.to_be_bytes() };
        let mut bytes = [&[order, 1, 0, 1][..], &number(body), &number(7), &number(fields)].concat();
        bytes.resize(16 + fields.next_multiple_of(8) as usize + body as usize, 7);
        bytes
    }

    #[test]
    fn what_is_a_conversation_passes_unchanged() {
        let lines = b"REJECTED ANONYMOUS\r\nOK 1234deadbeef\r\n".to_vec();
        let all = [lines, message(b'l', 0, 0), message(b'B', 3, 9), message(b'l', 500_000, 16)].concat();
        let (result, out) = passed(&all);
        result.unwrap();
        assert!(out == all);
    }

    #[test]
    fn what_is_too_large_is_not_kept_and_not_passed() {
        let largest = u32::try_from(LARGEST - FIXED).unwrap();
        assert!(passed(&message(b'l', largest, 0)).0.is_ok());
        for (body, fields) in [(largest + 1, 0), (0, largest + 1), (u32::MAX, 0), (0, u32::MAX), (u32::MAX, u32::MAX)] {
            let header = &mut message(b'B', 0, 0)[..];
            header[4..8].copy_from_slice(&body.to_be_bytes());
            header[12..16].copy_from_slice(&fields.to_be_bytes());
            let (result, out) = passed(header);
            assert!(result.unwrap_err().to_string().contains("too large") && out.is_empty());
        }
        let (result, out) = passed(&[b'x'; 5000]);
        assert!(result.unwrap_err().to_string().contains("too large") && out.is_empty());
        let cut = [message(b'l', 8, 0), vec![b'X'; 16]].concat();
        assert!(passed(&cut).0.is_err(), "a message of no byte order");
    }

    proptest! {
        #[test]
        fn hostile_bytes_are_harmless(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(bytes.starts_with(&passed(&bytes).1));
        }
    }
}
