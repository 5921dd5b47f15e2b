//! HTTP/1.1 messages: reading requests off a stream of bytes, and writing responses.
//!
//! What comes in is not trusted: the head and the body have a limit, and nothing is allocated on a promise.

use std::collections::VecDeque;
use std::io::Write;
use std::os::fd::OwnedFd;

use thiserror::Error;

use crate::response::Encoded;

/// The most bytes a request line and headers may have.
pub const MAX_HEAD: usize = 16 << 10;
/// The most bytes a body may have.
pub const MAX_BODY: usize = 1 << 20;
/// The most file descriptors that may come with a request, or wait for its end.
pub const MAX_FDS: usize = 32;
/// The most headers a request may have.
const MAX_HEADERS: usize = 64;

/// A whole request.
#[derive(Debug)]
pub struct HttpRequest {
    /// Such as `PUT`; any token.
    pub method: String,
    /// Such as `/api/v1/vm.info`.
    pub path: String,
    /// Empty if there is none.
    pub body: Vec<u8>,
    /// Descriptors that came along, in the order sent.
    pub fds: Vec<OwnedFd>,
    /// Whether the connection is to be closed after the answer.
    pub close: bool,
}

/// Why what came in is not HTTP, or more of it than is accepted. The connection ends with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Fault {
    /// Not HTTP.
    #[error("this is not a valid HTTP/1.1 request")]
    Malformed,
    /// Request line and headers too long.
    #[error("the request's headers exceed {MAX_HEAD} bytes or {MAX_HEADERS} lines")]
    HeadTooLong,
    /// Body too long.
    #[error("the request's body exceeds {MAX_BODY} bytes")]
    BodyTooLong,
    /// A body of unknown length.
    #[error("send the body with a Content-Length: transfer encodings are not supported")]
    TransferEncoding,
    /// Too many file descriptors.
    #[error("more than {MAX_FDS} file descriptors came with one request")]
    TooManyFds,
}

impl Fault {
    /// The HTTP status that tells it.
    pub fn status(self) -> u16 {
        match self {
            Self::Malformed | Self::TooManyFds => 400,
            Self::HeadTooLong => 431,
            Self::BodyTooLong => 413,
            Self::TransferEncoding => 501,
        }
    }
}

/// What the parser found in the bytes it has.
#[derive(Debug)]
pub(crate) enum Found {
    /// Nothing whole yet.
    Nothing,
    /// A head whose sender waits for "100 Continue" before it sends the body. Reported once.
    WantsContinue,
    /// A request.
    Request(HttpRequest),
}

/// What a head says.
#[derive(Debug)]
struct Head {
    method: String,
    path: String,
    close: bool,
    wants_continue: bool,
    body: usize,
}

/// Reads requests out of bytes that come in pieces of any size.
#[derive(Debug, Default)]
pub(crate) struct Parser {
    buffer: Vec<u8>,
    /// How much of the buffer has been taken out.
    start: usize,
    /// How much of the rest is known to hold no end of a head.
    searched: usize,
    /// The head, once it is whole; the rest then starts with the body.
    head: Option<Head>,
    /// Bytes of the stream that have been taken out.
    consumed: u64,
    /// Descriptors, each with the position in the stream of the byte it came with.
    fds: VecDeque<(u64, OwnedFd)>,
}

impl Parser {
    /// Takes in what one `recvmsg` gave. Linux ends a read with the bytes that descriptors were sent with, so they
    /// belong to the last of `bytes`.
    pub(crate) fn push(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) -> Result<(), Fault> {
        self.buffer.drain(..self.start);
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
        let last = self.position(self.buffer.len()).saturating_sub(1);
        self.fds.extend(fds.into_iter().map(|fd| (last, fd)));
        if self.fds.len() > MAX_FDS { Err(Fault::TooManyFds) } else { Ok(()) }
    }

    /// Bytes held.
    pub(crate) fn len(&self) -> usize {
        self.rest().len()
    }

    fn rest(&self) -> &[u8] {
        self.buffer.get(self.start..).unwrap_or_default()
    }

    /// The next thing in the bytes held.
    pub(crate) fn next(&mut self) -> Result<Found, Fault> {
        if self.head.is_none() {
            self.head = self.take_head()?;
            if let Some(head) = &self.head
                && head.wants_continue
                && self.len() < head.body
            {
                return Ok(Found::WantsContinue);
            }
        }
        match self.head.take() {
            Some(head) if self.len() >= head.body => Ok(Found::Request(self.take_request(head))),
            head => {
                self.head = head;
                Ok(Found::Nothing)
            }
        }
    }

    fn take_request(&mut self, head: Head) -> HttpRequest {
        let body = self.take(head.body);
        let count = self.fds.iter().take_while(|(position, _)| *position < self.consumed).count();
        let fds = self.fds.drain(..count).map(|(_, fd)| fd).collect();
        HttpRequest { method: head.method, path: head.path, body, fds, close: head.close }
    }

    fn take_head(&mut self) -> Result<Option<Head>, Fault> {
        // Empty lines before a request are allowed (RFC 9112, 2.2).
        let blank = self.rest().iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
        if blank > 0 {
            self.take(blank);
            self.searched = 0;
        }
        let Some(length) = self.find_end_of_head() else {
            return if self.len() > MAX_HEAD { Err(Fault::HeadTooLong) } else { Ok(None) };
        };
        if length > MAX_HEAD {
            return Err(Fault::HeadTooLong);
        }
        self.searched = 0;
        let bytes = self.take(length);
        parse_head(&bytes).map(Some)
    }

    /// The length of the head including the empty line after it.
    fn find_end_of_head(&mut self) -> Option<usize> {
        // Three bytes may have been the start of an end that came in pieces.
        let start = self.searched.saturating_sub(3);
        let tail = self.rest().get(start..).unwrap_or_default();
        let end = tail.iter().enumerate().find_map(|(at, byte)| {
            let rest = tail.get(at + 1..)?;
            match (byte, rest) {
                (b'\n', [b'\n', ..]) => Some(start + at + 2),
                (b'\n', [b'\r', b'\n', ..]) => Some(start + at + 3),
                _ => None,
            }
        });
        self.searched = self.len();
        end
    }

    /// Takes out the next `count` bytes.
    fn take(&mut self, count: usize) -> Vec<u8> {
        let taken = self.rest().get(..count).unwrap_or_default().to_vec();
        self.consumed = self.position(taken.len());
        self.start += taken.len();
        if self.rest().is_empty() {
            // Not kept: a body may have been large.
            self.buffer = Vec::new();
            self.start = 0;
        }
        taken
    }

    /// The position in the stream that is `offset` bytes into the rest.
    fn position(&self, offset: usize) -> u64 {
        self.consumed.saturating_add(u64::try_from(offset).unwrap_or(u64::MAX))
    }
}

fn parse_head(bytes: &[u8]) -> Result<Head, Fault> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Err(httparse::Error::TooManyHeaders) => return Err(Fault::HeadTooLong),
        Ok(httparse::Status::Partial) | Err(_) => return Err(Fault::Malformed),
    }
    let (Some(method), Some(path), Some(version)) = (request.method, request.path, request.version) else {
        return Err(Fault::Malformed);
    };
    let mut head =
        Head { method: method.to_owned(), path: path.to_owned(), close: version == 0, wants_continue: false, body: 0 };
    let mut length = None;
    for header in request.headers.iter() {
        let value = str::from_utf8(header.value).map_err(|_| Fault::Malformed)?.trim();
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        if is("content-length") {
            let given = parse_length(value)?;
            if length.replace(given).is_some_and(|earlier| earlier != given) {
                return Err(Fault::Malformed);
            }
        } else if is("transfer-encoding") {
            return Err(Fault::TransferEncoding);
        } else if is("expect") {
            head.wants_continue = value.eq_ignore_ascii_case("100-continue") && version == 1;
        } else if is("connection") {
            let has = |token: &str| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(token));
            head.close = has("close") || (version == 0 && !has("keep-alive"));
        }
    }
    head.body = length.unwrap_or(0);
    if head.body > MAX_BODY { Err(Fault::BodyTooLong) } else { Ok(head) }
}

/// Digits only: `parse` alone would take a sign.
fn parse_length(text: &str) -> Result<usize, Fault> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Fault::Malformed);
    }
    text.parse().map_err(|_| Fault::BodyTooLong)
}

/// The line that lets a waiting sender go on.
pub(crate) const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// Appends a response to `out`.
pub(crate) fn write_response(out: &mut Vec<u8>, answer: &Encoded, close: bool) {
    let reason = match answer.status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        _ => "Internal Server Error",
    };
    let connection = if close { "close" } else { "keep-alive" };
    let body = answer.body.as_deref().unwrap_or_default();
    let length = match (answer.status, body.len()) {
        // A length is forbidden with this one (RFC 9110, 8.6).
        (204, _) => String::new(),
        (_, 0) => "Content-Length: 0\r\n".to_owned(),
        (_, length) => format!("Content-Type: application/json\r\nContent-Length: {length}\r\n"),
    };
    // Writing to a vector cannot fail.
    let _ = write!(
        out,
        "HTTP/1.1 {} {reason}\r\nServer: spectrum-vmm\r\nConnection: {connection}\r\n{length}\r\n",
        answer.status
    );
    out.extend_from_slice(body);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requests(parser: &mut Parser) -> Result<Vec<HttpRequest>, Fault> {
        let mut found = Vec::new();
        loop {
            match parser.next()? {
                Found::Request(request) => found.push(request),
                Found::WantsContinue => {}
                Found::Nothing => return Ok(found),
            }
        }
    }

    fn fault(bytes: &[u8]) -> Fault {
        let mut parser = Parser::default();
        parser.push(bytes, Vec::new()).and_then(|()| requests(&mut parser).map(drop)).unwrap_err()
    }

    const TWO: &[u8] = b"\r\nPUT /a HTTP/1.1\r\nContent-Length: 5\r\n\r\nhelloGET /b HTTP/1.1\nConnection: close\n\n";

    fn assert_two(found: &[HttpRequest]) {
        let parts: Vec<_> =
            found.iter().map(|r| (r.method.as_str(), r.path.as_str(), r.body.as_slice(), r.close)).collect();
        assert_eq!(parts, [("PUT", "/a", &b"hello"[..], false), ("GET", "/b", &b""[..], true)]);
    }

    #[test]
    fn pieces_of_any_size_give_the_same_requests() {
        for size in 1..=TWO.len() {
            let mut parser = Parser::default();
            let mut found = Vec::new();
            for piece in TWO.chunks(size) {
                parser.push(piece, Vec::new()).unwrap();
                found.extend(requests(&mut parser).unwrap());
            }
            assert_two(&found);
            assert_eq!(parser.len(), 0);
        }
    }

    #[test]
    fn a_sender_that_waits_is_told_once_to_go_on() {
        let mut parser = Parser::default();
        parser.push(b"PUT /a HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n", Vec::new()).unwrap();
        assert!(matches!(parser.next(), Ok(Found::WantsContinue)));
        assert!(matches!(parser.next(), Ok(Found::Nothing)));
        parser.push(b"{}", Vec::new()).unwrap();
        assert!(matches!(parser.next(), Ok(Found::Request(request)) if request.body == b"{}"));
    }

    #[test]
    fn limits_hold_before_anything_is_kept() {
        assert_eq!(fault(b"\0\0\0\0\n\n"), Fault::Malformed);
        assert_eq!(fault(b"GET /a HTTP/1.1\r\nContent-Length: -1\r\n\r\n"), Fault::Malformed);
        assert_eq!(fault(b"GET /a HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"), Fault::Malformed);
        assert_eq!(fault(b"GET /a HTTP/1.1\r\nX: \xff\r\n\r\n"), Fault::Malformed);
        assert_eq!(fault(b"GET /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"), Fault::TransferEncoding);
        let huge = format!("PUT /a HTTP/1.1\r\nContent-Length: {}\r\n\r\n", MAX_BODY + 1);
        assert_eq!(fault(huge.as_bytes()), Fault::BodyTooLong);
        assert_eq!(fault(b"PUT /a HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n"), Fault::BodyTooLong);
        assert_eq!(fault(&vec![b'a'; MAX_HEAD + 1]), Fault::HeadTooLong);
        assert_eq!(fault(format!("GET /a HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(65)).as_bytes()), Fault::HeadTooLong);
    }

    #[test]
    fn descriptors_go_to_the_request_they_were_sent_with() {
        let fd = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let mut parser = Parser::default();
        // The end of one request and all of the next, whose descriptor ends the read.
        parser.push(b"PUT /a HTTP/1.1\r\nContent-Length: 2\r\n\r\n{", Vec::new()).unwrap();
        parser.push(b"}PUT /b HTTP/1.1\r\nContent-Length: 2\r\n\r\n", vec![fd()]).unwrap();
        parser.push(b"{}", vec![fd()]).unwrap();
        parser.push(b"GET /c HTTP/1.1\r\n\r\n", Vec::new()).unwrap();
        let counts: Vec<_> = requests(&mut parser).unwrap().iter().map(|request| request.fds.len()).collect();
        assert_eq!(counts, [0, 2, 0]);
        let flood = (0..=MAX_FDS).map(|_| fd()).collect();
        assert_eq!(parser.push(b"x", flood), Err(Fault::TooManyFds));
    }
}
