//! Length-prefixed frames: how bytes become messages and back.

use zeroize::Zeroize;

/// Largest accepted value of the length field: kind byte and payload, in bytes.
pub const MAX_FRAME: usize = 64 * 1024;

/// Largest payload of a frame, in bytes.
pub const MAX_PAYLOAD: usize = MAX_FRAME - 1;

const PREFIX: usize = 4;

/// What can be wrong with bytes received, or with a message to be sent.
#[derive(Debug, thiserror::Error)]
pub enum ProtoError {
    /// The length field is zero or above [`MAX_FRAME`].
    #[error("a frame of {0} bytes was announced, allowed are 1 to {MAX_FRAME}")]
    Length(u32),
    /// The kind byte is not one this side receives.
    #[error("a frame has the unknown kind {0}")]
    Kind(u8),
    /// The payload does not fit the kind.
    #[error("a frame of kind {kind} has a wrong payload: {reason}")]
    Payload {
        /// The kind byte.
        kind: u8,
        /// What is wrong with it.
        reason: String,
    },
    /// The message to be sent is larger than a frame.
    #[error("a message of {0} bytes is larger than the {MAX_PAYLOAD} bytes a frame can carry")]
    TooLarge(usize),
    /// More was pushed into a [`Decoder`] than [`Decoder::space`] allows.
    #[error("more bytes were buffered than one frame can have")]
    Overflow,
}

/// A message that travels in one frame.
pub trait Message: Sized {
    /// The kind byte and the payload.
    ///
    /// # Errors
    /// The payload cannot be represented.
    fn to_parts(&self) -> Result<(u8, Vec<u8>), ProtoError>;

    /// Decodes what [`Message::to_parts`] made, or whatever a hostile peer sent instead.
    ///
    /// # Errors
    /// The kind is unknown or the payload does not fit it.
    fn from_parts(kind: u8, payload: &[u8]) -> Result<Self, ProtoError>;

    /// Appends the message as one frame.
    ///
    /// # Errors
    /// The payload is larger than [`MAX_PAYLOAD`]; nothing is appended.
    fn encode(&self, out: &mut Vec<u8>) -> Result<(), ProtoError> {
        let (kind, payload) = self.to_parts()?;
        let too_large = || ProtoError::TooLarge(payload.len());
        if payload.len() > MAX_PAYLOAD {
            return Err(too_large());
        }
        let length = u32::try_from(payload.len() + 1).map_err(|_| too_large())?;
        out.extend_from_slice(&length.to_le_bytes());
        out.push(kind);
        out.extend_from_slice(&payload);
        Ok(())
    }
}

/// Cuts a byte stream into messages. Never holds more than one frame of the largest size.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
}

impl Decoder {
    /// How many bytes [`Decoder::push`] takes now. Never zero after [`Decoder::take`] returned `Ok(None)`.
    pub fn space(&self) -> usize {
        (PREFIX + MAX_FRAME).saturating_sub(self.buffer.len())
    }

    /// Adds received bytes.
    ///
    /// # Errors
    /// More bytes than [`Decoder::space`].
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), ProtoError> {
        if bytes.len() > self.space() {
            return Err(ProtoError::Overflow);
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// Takes the next complete message, if there is one.
    ///
    /// # Errors
    /// The stream is broken and cannot be continued.
    pub fn take<M: Message>(&mut self) -> Result<Option<M>, ProtoError> {
        let Some((prefix, rest)) = self.buffer.split_first_chunk::<PREFIX>() else { return Ok(None) };
        let announced = u32::from_le_bytes(*prefix);
        let length = usize::try_from(announced).map_err(|_| ProtoError::Length(announced))?;
        if length == 0 || length > MAX_FRAME {
            return Err(ProtoError::Length(announced));
        }
        let Some((kind, payload)) = rest.get(..length).and_then(<[u8]>::split_first) else { return Ok(None) };
        let message = M::from_parts(*kind, payload)?;
        // Draining leaves bytes where they are, and a seed must not stay in memory.
        self.buffer.get_mut(..PREFIX + length).unwrap_or_default().fill(0);
        self.buffer.drain(..PREFIX + length);
        Ok(Some(message))
    }
}

impl Drop for Decoder {
    fn drop(&mut self) {
        self.buffer.zeroize();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{FromAgent, FromCaller, Request, ToAgent};

    fn encoded(message: &ToAgent) -> Vec<u8> {
        let mut out = Vec::new();
        message.encode(&mut out).unwrap();
        out
    }

    #[test]
    fn messages_survive_being_cut_anywhere() {
        let messages = [ToAgent::Request(Request::Ping), ToAgent::Stdin(b"abc".to_vec()), ToAgent::Signal(15)];
        let bytes: Vec<u8> = messages.iter().flat_map(encoded).collect();
        for cut in 0..=bytes.len() {
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for part in [&bytes[..cut], &bytes[cut..]] {
                decoder.push(part).unwrap();
                while let Some(message) = decoder.take::<ToAgent>().unwrap() {
                    seen.push(message);
                }
            }
            assert_eq!(seen, messages, "cut at {cut}");
        }
    }

    #[test]
    fn lengths_out_of_range_end_the_stream() {
        for length in [0, u32::try_from(MAX_FRAME).unwrap() + 1, u32::MAX] {
            let mut decoder = Decoder::default();
            decoder.push(&length.to_le_bytes()).unwrap();
            assert!(matches!(decoder.take::<ToAgent>(), Err(ProtoError::Length(l)) if l == length));
        }
    }

    #[test]
    fn the_largest_frame_fits_and_no_more() {
        let mut decoder = Decoder::default();
        let bytes = encoded(&ToAgent::Stdin(vec![7; MAX_PAYLOAD]));
        assert_eq!(bytes.len(), decoder.space());
        decoder.push(&bytes).unwrap();
        assert!(matches!(decoder.push(&[0]), Err(ProtoError::Overflow)));
        assert_eq!(decoder.take(), Ok(Some(ToAgent::Stdin(vec![7; MAX_PAYLOAD]))));
        let mut out = Vec::new();
        let too_large = ToAgent::Stdin(vec![7; MAX_PAYLOAD + 1]).encode(&mut out);
        assert!(matches!(too_large, Err(ProtoError::TooLarge(_))));
        assert!(out.is_empty());
    }

    impl PartialEq for ProtoError {
        fn eq(&self, other: &Self) -> bool {
            self.to_string() == other.to_string()
        }
    }

    proptest! {
        /// Whatever arrives, in whatever pieces: no panic, bounded memory, and progress or an error.
        #[test]
        fn hostile_bytes_are_harmless(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..50)) {
            let mut agent = Decoder::default();
            let mut launcher = Decoder::default();
            for piece in &pieces {
                if agent.push(piece).is_ok() {
                    while let Ok(Some(_)) = agent.take::<ToAgent>() {}
                }
                if launcher.push(piece).is_ok() {
                    while let Ok(Some(_)) = launcher.take::<FromAgent>() {}
                }
                prop_assert!(agent.buffer.len() <= PREFIX + MAX_FRAME);
            }
        }

        /// Well-framed rubbish reaches the payload decoders.
        #[test]
        fn hostile_payloads_are_harmless(kind in 0u8..12, payload in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = ToAgent::from_parts(kind, &payload);
            let _ = FromAgent::from_parts(kind, &payload);
            let _ = FromCaller::from_parts(kind, &payload);
        }
    }
}
