//! Words of a guest that the desktop shows.

/// Longest text that is shown, in characters.
const LONGEST: usize = 200;

/// What can be shown: one line, no longer than a dialog's title, without characters that hide or reorder others.
pub fn shown(text: &str) -> String {
    text.chars().filter(|c| !is_hidden(*c)).take(LONGEST).collect()
}

/// The title of a dialog: whose it is comes first, and no text can hide it.
pub fn title(app: &str, title: &str) -> String {
    format!("[{app}] {}", shown(title)).trim_end().to_owned()
}

/// Control characters, and those of Unicode's bidirectional algorithm (UAX #9) and of no width.
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_it_is_is_always_seen() {
        assert_eq!(title("foot", "Open a file"), "[foot] Open a file");
        assert_eq!(title("foot", ""), "[foot]");
        let long = title("foot", &"x".repeat(10_000));
        assert!(long.starts_with("[foot] xxx") && long.len() < 300);
        assert_eq!(title("foot", "\u{202e}\n\x1b[2Jtxt\u{2066}"), "[foot] [2Jtxt");
    }
}
