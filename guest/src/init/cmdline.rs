//! What the kernel command line asks of PID 1.

/// How the VM shall end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Power off.
    PowerOff,
    /// Reset.
    Reboot,
}

/// The parameters of PID 1; all are called `spectrum.something`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// `spectrum.root=/dev/pmem0`: block device with the read-only root.
    pub root: Option<String>,
    /// `spectrum.rootfstype=erofs`: its file system.
    pub root_type: Option<String>,
    /// `spectrum.hostname=NAME`.
    pub hostname: Option<String>,
    /// `spectrum.debug`: a root shell on the console.
    pub debug: bool,
    /// `spectrum.exec="COMMAND LINE"`: run this with the shell as the unprivileged user instead of waiting for the
    /// launcher, its streams on the console, and power off when it has ended.
    pub exec: Option<String>,
    /// `spectrum.end=poweroff` or `reboot`: end at once, before anything is mounted. For tests of a VMM.
    pub end: Option<Ending>,
}

impl Parameters {
    /// Reads the kernel's command line. Unknown parameters of ours are returned beside it, everything else is the
    /// kernel's business.
    pub fn parse(line: &str) -> (Self, Vec<String>) {
        let mut parsed = Self::default();
        let mut unknown = Vec::new();
        for word in words(line) {
            let Some(parameter) = word.strip_prefix("spectrum.") else { continue };
            let (key, value) = match parameter.split_once('=') {
                Some((key, value)) => (key, Some(value.to_owned())),
                None => (parameter, None),
            };
            match (key, value) {
                ("root", Some(value)) => parsed.root = Some(value),
                ("rootfstype", Some(value)) => parsed.root_type = Some(value),
                ("hostname", Some(value)) => parsed.hostname = Some(value),
                ("exec", Some(value)) => parsed.exec = Some(value),
                ("debug", None) => parsed.debug = true,
                ("end", Some(value)) if value == "poweroff" => parsed.end = Some(Ending::PowerOff),
                ("end", Some(value)) if value == "reboot" => parsed.end = Some(Ending::Reboot),
                _ => unknown.push(word),
            }
        }
        (parsed, unknown)
    }
}

/// Splits the line as the kernel does: at white space outside double quotes, and the quotes are dropped.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quoted = false;
    for character in line.chars() {
        match character {
            '"' => quoted = !quoted,
            c if c.is_ascii_whitespace() && !quoted => {
                if !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
            }
            c => word.push(c),
        }
    }
    if !word.is_empty() {
        words.push(word);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_at_once() {
        let line = "quiet spectrum.root=/dev/pmem0 console=hvc0 spectrum.debug spectrum.hostname=foot \
                    spectrum.rootfstype=ext4 spectrum.end=reboot\n";
        let (parsed, unknown) = Parameters::parse(line);
        let expected = Parameters {
            root: Some("/dev/pmem0".into()),
            root_type: Some("ext4".into()),
            hostname: Some("foot".into()),
            debug: true,
            exec: None,
            end: Some(Ending::Reboot),
        };
        assert_eq!(parsed, expected);
        assert!(unknown.is_empty());
    }

    #[test]
    fn quotes_keep_spaces() {
        for line in [r#"a "spectrum.exec=id; cat /x" b"#, r#"a spectrum.exec="id; cat /x" b"#] {
            assert_eq!(Parameters::parse(line).0.exec.as_deref(), Some("id; cat /x"));
        }
    }

    #[test]
    fn the_last_one_counts_and_equal_signs_stay() {
        let (parsed, _) = Parameters::parse("spectrum.exec=a spectrum.exec=b=c");
        assert_eq!(parsed.exec.as_deref(), Some("b=c"));
    }

    #[test]
    fn unknown_ones_of_ours_are_reported() {
        let (parsed, unknown) = Parameters::parse("root=/dev/sda spectrum.rot=x spectrum.end=never spectrum.debug=1");
        assert_eq!(parsed, Parameters::default());
        assert_eq!(unknown, ["spectrum.rot=x", "spectrum.end=never", "spectrum.debug=1"]);
    }

    #[test]
    fn an_empty_or_unfinished_line_is_fine() {
        assert_eq!(Parameters::parse("").0, Parameters::default());
        assert_eq!(Parameters::parse("spectrum.exec=\"a b").0.exec.as_deref(), Some("a b"));
    }
}
