//! `spectrum ps`, and what is suggested for a name that no VM has.

use std::{
    io::{self, Write},
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

use super::{
    super::{
        RunError, folder,
        grants::{self, Record},
        io_error,
        state::{Origin, State},
    },
    printable_text,
};

/// How alike a name must be for being suggested, of 0 to 1: a letter wrong in a short one, or two in a long one.
const ALIKE: f64 = 0.6;

/// A VM as `ps --json` shows it.
#[derive(Serialize)]
struct Row<'a> {
    name: &'a str,
    /// `starting` or `running`.
    state: &'a str,
    template: &'a str,
    /// Name of the home directory that it keeps.
    persist: Option<&'a str>,
    grants: Vec<Record>,
    command: &'a [String],
    origin: Origin,
    /// Seconds since 1970.
    started: u64,
    /// Process of the VMM.
    pid: Option<u32>,
    /// Process of the launcher.
    launcher_pid: u32,
}

impl<'a> Row<'a> {
    fn new(folder: &Path, state: &'a State) -> Self {
        Self {
            name: &state.name,
            state: if state.ready { "running" } else { "starting" },
            template: &state.template,
            persist: state.persist.as_deref(),
            grants: grants::list(folder),
            command: &state.command,
            origin: state.origin,
            started: state.started,
            pid: state.vmm.map(|vmm| vmm.pid),
            launcher_pid: state.launcher.pid,
        }
    }
}

/// Prints the VMs that run.
pub fn print(json: bool) -> Result<(), RunError> {
    let all = folder::running().map_err(io_error("look for running VMs"))?;
    let rows: Vec<Row<'_>> = all.iter().map(|(folder, state)| Row::new(folder, state)).collect();
    let text = if json { serde_json::to_string_pretty(&rows).unwrap_or_default() + "\n" } else { table(&rows) };
    io::stdout().write_all(text.as_bytes()).map_err(io_error("write to standard output"))
}

fn table(rows: &[Row<'_>]) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let head = ["NAME", "STATE", "TEMPLATE", "PID", "AGE"].map(String::from);
    let lines: Vec<([String; 5], String)> = std::iter::once((head, "COMMAND".into()))
        .chain(rows.iter().map(|row| {
            let pid = row.pid.map_or_else(|| "-".into(), |pid| pid.to_string());
            let age = age(now.saturating_sub(row.started));
            let cells = [row.name.into(), row.state.into(), row.template.into(), pid, age];
            (cells, printable_text(row.command.join(" ").as_bytes()).replace('\n', " "))
        }))
        .collect();
    let mut widths = [0; 5];
    for (cells, _) in &lines {
        widths.iter_mut().zip(cells).for_each(|(width, cell)| *width = cell.len().max(*width));
    }
    let line = |(cells, command): &([String; 5], String)| {
        let cells: String = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}  ")).collect();
        cells + command + "\n"
    };
    lines.iter().map(line).collect()
}

/// In the largest unit that is full.
fn age(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// What to say after a name that none of `names` is.
pub fn hint(name: &str, names: &[&str]) -> String {
    let alike = |other: &str| {
        // Who leaves out the number means the first.
        let begins = if other.rsplit_once('-').is_some_and(|(start, _)| start == name) { 1.0 } else { 0.0 };
        strsim::normalized_damerau_levenshtein(name, other).max(begins)
    };
    let nearest = names.iter().map(|other| (alike(other), other)).max_by(|(one, _), (other, _)| one.total_cmp(other));
    match nearest {
        Some((likeness, nearest)) if likeness >= ALIKE => format!(": did you mean {nearest}?"),
        Some(_) => format!(": there are {}", names.join(", ")),
        None => ": no VM runs".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_suggested() {
        let names = ["firefox-1", "foot-1", "mail"];
        assert_eq!(hint("fot-1", &names), ": did you mean foot-1?");
        assert_eq!(hint("foot", &names), ": did you mean foot-1?");
        assert_eq!(hint("firefox", &names), ": did you mean firefox-1?");
        assert_eq!(hint("amil", &names), ": did you mean mail?");
        assert_eq!(hint("gimp", &names), ": there are firefox-1, foot-1, mail");
        assert_eq!(hint("gimp", &[]), ": no VM runs");
    }

    #[test]
    fn a_table_has_columns() {
        let command = ["sh".to_owned(), "a\x1b[2J\nb".to_owned()];
        let row = |name, pid| Row {
            name,
            state: "running",
            template: "default",
            persist: None,
            grants: Vec::new(),
            command: &command,
            origin: Origin::Boot,
            started: u64::MAX,
            pid,
            launcher_pid: 1,
        };
        let expected = "NAME    STATE    TEMPLATE  PID   AGE  COMMAND\n\
                        foot-1  running  default   1234  0 s  sh a\u{fffd}[2J b\n\
                        a       running  default   -     0 s  sh a\u{fffd}[2J b\n";
        assert_eq!(table(&[row("foot-1", Some(1234)), row("a", None)]), expected);
        assert_eq!([59, 60, 7200, 200_000].map(age), ["59 s", "1 min", "2 h", "2 d"]);
    }
}
