//! What applications may do beyond their VM: one file of rules, the first that matches decides.
//!
//! A rule is a line `SERVICE APP TARGET ACTION`. What no rule matches is denied, and so is everything while the file has a
//! mistake in it.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use vmm_config::keyvalue::nearest;

use crate::{
    home::is_name,
    places::Places,
    text::{self, Mistake, TextError},
};

/// Matches everything, alone or for the rest of a word.
const WILDCARD: char = '*';

/// What is not clear without a rule.
const DEFAULT: Action = Action::Deny;

/// What an application asks the host for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    Files,
    Clipboard,
    OpenUrl,
    Notify,
    Network,
    Sound,
    Microphone,
    Camera,
    Exec,
}

impl Service {
    const NAMES: [(&'static str, Self); 9] = [
        ("files", Self::Files),
        ("clipboard", Self::Clipboard),
        ("open-url", Self::OpenUrl),
        ("notify", Self::Notify),
        ("network", Self::Network),
        ("sound", Self::Sound),
        ("microphone", Self::Microphone),
        ("camera", Self::Camera),
        ("exec", Self::Exec),
    ];
}

impl FromStr for Service {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        by_name("service", text, &Self::NAMES)
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name_of(*self, &Self::NAMES))
    }
}

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It is done.
    Allow,
    /// The user is asked.
    Ask,
    /// It is not done.
    Deny,
}

impl Action {
    const NAMES: [(&'static str, Self); 3] = [("allow", Self::Allow), ("ask", Self::Ask), ("deny", Self::Deny)];
}

impl FromStr for Action {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        by_name("action", text, &Self::NAMES)
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name_of(*self, &Self::NAMES))
    }
}

fn by_name<T: Copy>(what: &str, text: &str, names: &[(&'static str, T)]) -> Result<T, String> {
    if let Some((_, value)) = names.iter().find(|(name, _)| *name == text) {
        return Ok(*value);
    }
    let known = names.iter().map(|(name, _)| *name);
    Err(match nearest(text, known.clone()) {
        Some(right) => format!("unknown {what} {text:?}: did you mean {right:?}?"),
        None => format!("unknown {what} {text:?}; known are {}", known.collect::<Vec<_>>().join(", ")),
    })
}

fn name_of<T: PartialEq>(value: T, names: &[(&'static str, T)]) -> &'static str {
    names.iter().find(|(_, other)| *other == value).map_or("", |(name, _)| name)
}

/// A word of a rule: itself, or the beginning of words.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Pattern {
    Exact(String),
    Prefix(String),
}

impl Pattern {
    fn matches(&self, word: &str) -> bool {
        match self {
            Self::Exact(text) => text == word,
            Self::Prefix(text) => word.starts_with(text.as_str()),
        }
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (pattern, rest) = match text.strip_suffix(WILDCARD) {
            Some(rest) => (Self::Prefix(rest.to_owned()), rest),
            None => (Self::Exact(text.to_owned()), text),
        };
        if rest.contains(WILDCARD) {
            return Err(format!("{text:?} has a {WILDCARD} in front of other characters: it can only be the last one"));
        }
        if text.contains(['"', '\'']) || text.contains(char::is_control) {
            return Err(format!(
                "{text:?} has a quote or a control character in it: words are separated by spaces alone"
            ));
        }
        Ok(pattern)
    }
}

/// One line of the policy.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    /// Line in the file, from 1.
    line: usize,
    /// None matches all.
    service: Option<Service>,
    app: Pattern,
    target: Pattern,
    action: Action,
    /// As it is written.
    text: String,
}

impl Rule {
    fn matches(&self, service: Service, app: &str, target: &str) -> bool {
        self.service.is_none_or(|own| own == service) && self.app.matches(app) && self.target.matches(target)
    }
}

/// The rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The file; none if there is none.
    path: Option<PathBuf>,
    rules: Vec<Rule>,
}

/// What was decided, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// What happens.
    pub action: Action,
    /// The rule with its place, or that there is none.
    pub because: String,
}

impl Policy {
    /// Reads the policy that counts: the user's, else the system's. Nothing of a file with a mistake is used, and no other
    /// file in its place.
    pub fn load(places: &Places) -> Result<Self, TextError> {
        for path in places.policies() {
            if let Some(text) = text::read(&path)? {
                return Ok(Self::parse(&path, &text)?);
            }
        }
        Ok(Self { path: None, rules: Vec::new() })
    }

    /// Reads a given file, which must be there.
    pub fn load_file(path: &Path) -> Result<Self, TextError> {
        let text = text::read(path)?.ok_or_else(|| TextError::file(path)(std::io::ErrorKind::NotFound.into()))?;
        Ok(Self::parse(path, &text)?)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, Mistake> {
        let mut rules = Vec::new();
        let mut start = 0;
        for (index, line) in text.split_inclusive('\n').enumerate() {
            let mistake = |(byte, message): (usize, String)| Mistake::at(path, text, start + byte, message);
            rules.extend(parse_line(index + 1, line).map_err(mistake)?);
            start += line.len();
        }
        Ok(Self { path: Some(path.to_owned()), rules })
    }

    /// What the rules say.
    pub fn decide(&self, service: Service, app: &str, target: &str) -> Decision {
        let rule = self.rules.iter().find(|rule| rule.matches(service, app, target));
        match (rule, &self.path) {
            (Some(rule), Some(path)) => {
                let because = format!("{}:{}: {}", path.display(), rule.line, rule.text);
                Decision { action: rule.action, because }
            }
            (_, Some(path)) => Decision { action: DEFAULT, because: format!("no rule of {} matches", path.display()) },
            (_, None) => Decision { action: DEFAULT, because: "there is no policy".into() },
        }
    }

    /// What was read, for people.
    pub fn summary(&self) -> String {
        match &self.path {
            Some(path) => format!("{}: {} rules, no mistake\n", path.display(), self.rules.len()),
            None => "there is no policy: everything is denied\n".into(),
        }
    }
}

/// One line: a rule, or none, or a mistake and the byte it is at.
fn parse_line(number: usize, line: &str) -> Result<Option<Rule>, (usize, String)> {
    let words = words(line);
    let at = |word: &(usize, &str)| word.0;
    let [service, app, target, action] = words.as_slice() else {
        return match words.as_slice() {
            [] => Ok(None),
            [_, _, _, _, further, ..] => Err((at(further), "there is more after the action".into())),
            [.., last] => {
                Err((at(last) + last.1.len(), "the line is too short: write SERVICE APP TARGET ACTION".into()))
            }
        };
    };
    let service_of = |text: &str| if text == "*" { Ok(None) } else { text.parse().map(Some) };
    let rule = Rule {
        line: number,
        service: service_of(service.1).map_err(|message| (at(service), message))?,
        app: pattern_of_app(app.1).map_err(|message| (at(app), message))?,
        target: target.1.parse().map_err(|message| (at(target), message))?,
        action: action.1.parse().map_err(|message| (at(action), message))?,
        text: words.iter().map(|word| word.1).collect::<Vec<_>>().join(" "),
    };
    Ok(Some(rule))
}

fn pattern_of_app(text: &str) -> Result<Pattern, String> {
    let pattern: Pattern = text.parse()?;
    match &pattern {
        Pattern::Exact(name) if !is_name(name) => Err(format!("{name:?} cannot be the name of an app")),
        Pattern::Prefix(name) if !name.is_empty() && !is_name(name) => {
            Err(format!("no app's name can begin with {name:?}"))
        }
        _ => Ok(pattern),
    }
}

/// The words of a line with the bytes they begin at, up to a word that begins with #.
fn words(line: &str) -> Vec<(usize, &str)> {
    let mut words = Vec::new();
    let mut rest = line;
    loop {
        rest = rest.trim_start();
        let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if word.is_empty() || word.starts_with('#') {
            return words;
        }
        words.push((line.len() - rest.len(), word));
        rest = after;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = "\
# what             who       what for             then
files              *         /home/u/Pictures/*   ask
files              gimp      /home/u/one          allow   # never reached by others
open-url           mail      https://x.org/#a     allow
exec               mail      ssh-agent            ask
*                  untrusted-* *                  deny

network            *         *                    allow
";

    fn policy() -> Policy {
        Policy::parse(Path::new("p"), EXAMPLE).unwrap()
    }

    #[test]
    fn the_first_rule_that_matches_decides() {
        use Action::{Allow, Ask, Deny};
        let table = [
            (Service::Files, "gimp", "/home/u/Pictures/a", Ask, "p:2: files * /home/u/Pictures/* ask"),
            (Service::Files, "gimp", "/home/u/Pictures", Deny, "no rule of p matches"),
            (Service::Files, "gimp", "/home/u/one", Allow, "p:3: files gimp /home/u/one allow"),
            (Service::Files, "gimp2", "/home/u/one", Deny, "no rule of p matches"),
            (Service::Files, "gim", "/home/u/one", Deny, "no rule of p matches"),
            (Service::Files, "gimp", "/home/u/one/x", Deny, "no rule of p matches"),
            (Service::Files, "untrusted-a", "/home/u/Pictures/a", Ask, "p:2: files * /home/u/Pictures/* ask"),
            (Service::OpenUrl, "mail", "https://x.org/#a", Allow, "p:4: open-url mail https://x.org/#a allow"),
            (Service::OpenUrl, "mail", "https://x.org/", Deny, "no rule of p matches"),
            (Service::Exec, "mail", "ssh-agent", Ask, "p:5: exec mail ssh-agent ask"),
            (Service::Exec, "ssh-agent", "mail", Deny, "no rule of p matches"),
            (Service::Network, "untrusted-a", "x:80", Deny, "p:6: * untrusted-* * deny"),
            (Service::Network, "untrusted", "x:80", Allow, "p:8: network * * allow"),
            (Service::Camera, "gimp", "-", Deny, "no rule of p matches"),
        ];
        for (service, app, target, action, because) in table {
            let decision = policy().decide(service, app, target);
            assert_eq!((decision.action, decision.because.as_str()), (action, because), "{service} {app} {target}");
        }
    }

    #[test]
    fn without_a_rule_everything_is_denied() {
        let folder = tempfile::tempdir().unwrap();
        for policy in [Policy::load(&Places::at(folder.path())).unwrap(), Policy::parse(Path::new("p"), "").unwrap()] {
            for (_, service) in Service::NAMES {
                assert_eq!(policy.decide(service, "foot", "*").action, Action::Deny, "{service}");
            }
        }
    }

    #[test]
    fn one_mistake_and_nothing_of_the_file_is_used() {
        let table = [
            ("file * * allow", "p:2:1: unknown service \"file\": did you mean \"files\"?"),
            ("wifi-scan * * allow", "p:2:1: unknown service \"wifi-scan\"; known are files, clipboard,"),
            ("  files * * alow", "p:2:13: unknown action \"alow\": did you mean \"allow\"?"),
            ("files * * ALLOW", "p:2:11: unknown action \"ALLOW\""),
            ("files * allow", "p:2:14: the line is too short: write SERVICE APP TARGET ACTION"),
            ("files", "p:2:6: the line is too short"),
            ("files * * # allow", "p:2:10: the line is too short"),
            ("files * /a b allow", "p:2:14: there is more after the action"),
            ("files a/b * allow", "p:2:7: \"a/b\" cannot be the name of an app"),
            ("files .a* * allow", "p:2:7: no app's name can begin with \".a\""),
            ("open-url ä https://*.org/ ask", "p:2:10: \"ä\" cannot be"),
            ("open-url a https://*.org/ ask", "p:2:12: \"https://*.org/\" has a * in front of other characters"),
            ("files a /a** ask", "p:2:9: \"/a**\" has a * in front"),
            ("files a \"/a\" ask", "p:2:9: "),
            ("files a /a\u{1b}[2J ask", "p:2:9: "),
        ];
        for (line, expected) in table {
            let text = format!("network * * allow\n{line}\r\nfiles * * allow\n");
            let error = Policy::parse(Path::new("p"), &text).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{line:?}: {error}");
            assert!(!error.contains('\u{1b}'), "{error:?}");
        }
    }

    #[test]
    fn the_users_file_counts_alone_even_if_it_cannot_be_used() {
        let folder = tempfile::tempdir().unwrap();
        let places = Places::at(folder.path());
        let [user, system] = [0, 1].map(|at| places.policies().nth(at).unwrap());
        for (path, text) in [(&system, "files * * allow\n"), (&user, "# nothing\n")] {
            let action = || Policy::load(&places).map(|policy| policy.decide(Service::Files, "a", "/").action);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
            let expected = if text.contains("allow") { Action::Allow } else { Action::Deny };
            assert_eq!(action().unwrap(), expected);
            if *path == user {
                std::fs::write(path, "files * * alow\n").unwrap();
                assert!(action().is_err());
            }
        }
    }

    #[test]
    fn the_documentations_example_can_be_used() {
        let text = include_str!("../../../docs/launcher.md");
        let example = text.split("```policy\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
        let policy = Policy::parse(Path::new("p"), example).unwrap();
        assert_eq!(policy.decide(Service::OpenUrl, "web", "https://x.org").action, Action::Allow);
        assert_eq!(policy.decide(Service::Notify, "untrusted-x", "-").action, Action::Deny);
        for (name, _) in Service::NAMES {
            assert!(text.contains(&format!("`{name}`")), "{name}");
        }
    }
}
