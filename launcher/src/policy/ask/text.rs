//! What an application chose, made safe to be shown in a question.

/// Most characters that are shown of the beginning, and of the end.
const BEGINNING: usize = 120;
const END: usize = 60;

/// Stands for what is not shown.
const REPLACEMENT: char = '\u{fffd}';

/// One line of at most 181 characters in which every character has a place of its own and the order is the one on the screen: what
/// is neither a letter, a digit, ASCII punctuation nor a space becomes U+FFFD. That leaves nothing that moves, hides, or is
/// invisible: controls, line separators, bidirectional and zero-width characters, other spaces. Quotation marks like those
/// around it, and what could begin a tag, go too.
pub fn shown(text: &str) -> String {
    let safe = |c: char| match c {
        '<' | '>' => REPLACEMENT,
        // Fillers of Hangul are letters, and blank.
        '\u{115f}' | '\u{1160}' | '\u{3164}' | '\u{ffa0}' => REPLACEMENT,
        c if c == ' ' || c.is_ascii_graphic() || c.is_alphanumeric() => c,
        _ => REPLACEMENT,
    };
    // Never more than is shown is looked at, but for finding the end.
    let count = text.chars().count();
    if count <= BEGINNING + END {
        return text.chars().map(safe).collect();
    }
    let beginning = text.chars().take(BEGINNING).map(safe);
    let end = text.chars().skip(count - END).map(safe);
    beginning.chain(['\u{2026}']).chain(end).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_what_it_looks_like() {
        for same in ["/home/me/\u{c4}pfel 1.pdf", "https://x.org/?a=1&b=%20", "vault:ssh-agent", "\u{65e5}\u{672c}"] {
            assert_eq!(shown(same), same);
        }
        let hostile = [
            ("a\nApp: bank", "a\u{fffd}App: bank"),
            ("a\u{2028}b\u{2029}c\r\x0b", "a\u{fffd}b\u{fffd}c\u{fffd}\u{fffd}"),
            ("exe\u{202e}fdp.\u{2066}x", "exe\u{fffd}fdp.\u{fffd}x"),
            ("\u{200b}\u{200d}\u{feff}\u{ad}\u{e0041}\u{fe0f}", "\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}\u{fffd}"),
            ("a\u{a0}\u{3000}b\u{3164}", "a\u{fffd}\u{fffd}b\u{fffd}"),
            ("\u{201d} Service: \u{201c}", "\u{fffd} Service: \u{fffd}"),
            ("<b>x</b>", "\u{fffd}b\u{fffd}x\u{fffd}/b\u{fffd}"),
            ("\x1b[2J\x7f\u{9b}", "\u{fffd}[2J\u{fffd}\u{fffd}"),
        ];
        for (text, expected) in hostile {
            assert_eq!(shown(text), expected, "{text:?}");
        }
    }

    #[test]
    fn beginning_and_end_of_what_is_long() {
        let text = format!("https://x.org/{}/end", "\u{e4}".repeat(5000));
        let seen = shown(&text);
        assert!(seen.starts_with("https://x.org/\u{e4}") && seen.ends_with("\u{e4}/end") && seen.contains('\u{2026}'));
        assert_eq!(seen.chars().count(), 181);
        assert_eq!(shown(&"a".repeat(180)), "a".repeat(180));
    }
}
