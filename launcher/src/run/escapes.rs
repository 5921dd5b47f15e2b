//! What a program in a VM may do with the user's terminal: move the cursor, colour, erase, choose modes. It may not set the title or the
//! clipboard, print, or read back what is on the screen: the words of a command for that would come from a guest, and the answers
//! would be typed.
//!
//! Control sequences: ECMA-48, and xterm's for what is in use beside it.

/// Longest control sequence that is passed on, in bytes. The longest in use set colours.
const LONGEST: usize = 128;

/// A filter for bytes that arrive in pieces.
#[derive(Debug, Default)]
pub struct Escapes {
    state: State,
    /// The sequence that has begun.
    begun: Vec<u8>,
    /// Bytes that are missing of a UTF-8 character.
    missing: u8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Text,
    /// After the lead byte of characters to U+00BF: one below U+00A0 is a control.
    Latin,
    /// After ESC.
    Escape,
    /// After ESC and `[`.
    Control,
    /// In a control sequence that is too long.
    Overlong,
    /// In what ends with ESC and a backslash: title, clipboard, queries.
    String,
    /// After an ESC in that.
    StringEscape,
}

impl Escapes {
    /// What of `bytes`, and of what came before, may go to the terminal.
    pub fn filter(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes.len());
        bytes.iter().for_each(|byte| self.take(*byte, &mut out));
        out
    }

    fn take(&mut self, byte: u8, out: &mut Vec<u8>) {
        match (self.state, byte) {
            (State::StringEscape, b'\\') | (State::String, 0x07 | 0x18 | 0x1a) => self.state = State::Text,
            (State::String, 0x1b) => self.state = State::StringEscape,
            (State::String, _) => {}
            // A string that was broken off by another sequence.
            (State::StringEscape, _) => {
                self.begin();
                self.escape(byte, out);
            }
            (_, 0x1b) => self.begin(),
            // CAN and SUB break a sequence off.
            (State::Escape | State::Control | State::Overlong, 0x18 | 0x1a) => self.state = State::Text,
            // Other controls are carried out in the midst of one.
            (State::Escape | State::Control | State::Overlong, 0x00..0x20) => text_control(byte, out),
            (State::Escape, _) => self.escape(byte, out),
            (State::Control, 0x20..0x40) => {
                self.begun.push(byte);
                if self.begun.len() > LONGEST {
                    self.state = State::Overlong;
                }
            }
            (State::Control, 0x40..0x7f) => {
                self.begun.push(byte);
                if is_harmless(&self.begun) {
                    out.append(&mut self.begun);
                }
                self.state = State::Text;
            }
            (State::Overlong, 0x20..0x40) => {}
            (State::Control | State::Overlong, _) => self.state = State::Text,
            (State::Latin, 0xa0..0xc0) => {
                out.extend([0xc2, byte]);
                self.state = State::Text;
            }
            (State::Latin, 0x80..0xa0) => self.state = State::Text,
            (State::Latin | State::Text, _) => {
                self.state = State::Text;
                self.text(byte, out);
            }
        }
    }

    fn begin(&mut self) {
        self.state = State::Escape;
        self.begun.clear();
        self.begun.push(0x1b);
        self.missing = 0;
    }

    /// After ESC, and perhaps intermediate bytes.
    fn escape(&mut self, byte: u8, out: &mut Vec<u8>) {
        self.begun.push(byte);
        let only = self.begun.len() == 2;
        match byte {
            b'[' if only => self.state = State::Control,
            // DCS, SOS, OSC, PM, APC, and screen's title.
            b'P' | b'X' | b']' | b'^' | b'_' | b'k' if only => self.state = State::String,
            0x20..0x30 if self.begun.len() < 4 => {}
            // DECID asks what the terminal is.
            0x30..0x7f if !(only && byte == b'Z') => {
                out.append(&mut self.begun);
                self.state = State::Text;
            }
            _ => self.state = State::Text,
        }
    }

    /// Bytes from 0x80 on that belong to no character would be controls for a terminal without UTF-8.
    fn text(&mut self, byte: u8, out: &mut Vec<u8>) {
        match byte {
            0x80..0xc0 if self.missing > 0 => {
                self.missing -= 1;
                out.push(byte);
                return;
            }
            0xc2 => self.state = State::Latin,
            0xc3..=0xf4 => {
                self.missing = match byte {
                    0xc3..0xe0 => 1,
                    0xe0..0xf0 => 2,
                    _ => 3,
                };
                out.push(byte);
                return;
            }
            0x20..=0x7e => out.push(byte),
            0x00..=0x1f => text_control(byte, out),
            _ => {}
        }
        self.missing = 0;
    }
}

/// A control between characters. ENQ would be answered.
fn text_control(byte: u8, out: &mut Vec<u8>) {
    if byte != 0x05 {
        out.push(byte);
    }
}

/// Whether a control sequence is one of those that may be used. Unknown ones are not.
fn is_harmless(sequence: &[u8]) -> bool {
    let Some((last, rest)) = sequence.split_last() else { return false };
    let intermediate = rest.iter().rev().take_while(|byte| (0x20..0x30).contains(*byte)).copied().collect::<Vec<_>>();
    match intermediate.as_slice() {
        // Cursor, erasing, scrolling, modes, colours, and the questions where the cursor is and what the terminal can.
        [] => b"@ABCDEFGHIJKLMPSTXZ`abcdefghlmnqrsu".contains(last),
        // Cursor style, soft reset, whether a mode is on.
        [b' '] => *last == b'q',
        [b'!' | b'$'] => *last == b'p',
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filtered(bytes: &[u8]) -> Vec<u8> {
        let whole = Escapes::default().filter(bytes);
        // However they are cut.
        let mut escapes = Escapes::default();
        assert_eq!(bytes.chunks(1).flat_map(|piece| escapes.filter(piece)).collect::<Vec<_>>(), whole);
        whole
    }

    #[test]
    fn what_programs_draw_with_passes() {
        let texts = [
            "plain \u{e4}\u{20ac}\u{1f600}\u{a0}\u{bf}\r\n\ttab\x08\x07",
            "\x1b[1;31mred\x1b[0m\x1b[38;2;1;2;3m\x1b[K\x1b[2J\x1b[10;20H\x1b[?1049h\x1b[?25l\x1b[5;10r",
            "\x1b7\x1b8\x1bM\x1b(B\x1b)0\x1b=\x1b>\x1bc\x1b[4 q\x1b[!p\x1b[?2026$p\x1b[6n\x1b[c\x1b[>c",
            "\x1b[1\r;2H",
        ];
        for text in &texts[..3] {
            assert_eq!(String::from_utf8(filtered(text.as_bytes())).unwrap(), *text);
        }
        assert_eq!(filtered(texts[3].as_bytes()), b"\r\x1b[1;2H");
    }

    #[test]
    fn what_reaches_beyond_the_screen_does_not() {
        let table: &[&[u8]] = &[
            b"\x1b]0;title\x07",
            b"\x1b]52;c;aGk=\x1b\\",
            b"\x1bPq#0;2;0;0;0\x1b\\",
            b"\x1bP$qm\x1b\\",
            b"\x1b_app\x1b\\\x1b^pm\x1b\\\x1bXsos\x1b\\\x1bktitle\x1b\\",
            b"\x1b[21t\x1b[5i\x1b[?5i\x1b[0x\x1b[1;1;1;1;1;1*y\x1b[62\"p",
            b"\x05\x1bZ",
            "\u{9d}0;title\u{9c}".as_bytes(),
            b"\x9b\x9d\x90",
            b"\xc2\x9b21t",
        ];
        let seen: Vec<String> = table.iter().map(|bytes| String::from_utf8(filtered(bytes)).unwrap()).collect();
        assert_eq!(seen, ["", "", "", "", "", "", "", "0;title", "", "21t"]);
        assert_eq!(filtered(b"\x1b]0;a\x1b[1mb"), b"\x1b[1mb", "a string that another sequence breaks off");
        let long = [&b"\x1b["[..], &b"1;".repeat(1000), b"mx"].concat();
        assert_eq!(filtered(&long), b"x");
        // A character that is cut off hides nothing.
        assert_eq!(filtered(b"\xe2\x1b]0;x\x07\x82\xc3("), b"\xe2\xc3(");
    }
}
