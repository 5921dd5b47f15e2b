//! Files of the host in a guest: how fast they are, whether they keep what is written, how many may be open.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use rustix::mount::{MountFlags, mount};
use rustix::process::{Resource, Rlimit, setrlimit};
use tests::journal;

use crate::jobs::text;
use crate::{Outcome, say};

/// Bytes of one read or write.
const CHUNK: usize = 1 << 20;
const PLACE: &str = "/files";

fn mounted(tag: &str) -> Result<(), String> {
    fs::create_dir_all(PLACE).map_err(text)?;
    mount(tag, PLACE, "virtiofs", MountFlags::NOSUID | MountFlags::NODEV, None).map_err(text)
}

/// Mounts the file system that `TAG/FILE` names, and waits for a line on the console: the file is granted by then.
fn granted(argument: &str) -> Result<PathBuf, String> {
    let (tag, path) = argument.split_once('/').ok_or("TAG/FILE is wanted")?;
    mounted(tag)?;
    say("files: mounted");
    io::stdin().lock().read_line(&mut String::new()).map_err(text)?;
    Ok(Path::new(PLACE).join(path))
}

/// Writes a journal of `TAG/FILE:BLOCKS`, and says of each block that it is on the host's disk when the host says so.
pub fn write_journal(argument: &str) -> Outcome {
    let (file, blocks) = argument.split_once(':').ok_or("TAG/FILE:BLOCKS is wanted")?;
    let (path, blocks): (_, u32) = (granted(file)?, blocks.parse().map_err(text)?);
    let mut file = OpenOptions::new().write(true).create_new(true).open(path).map_err(text)?;
    for number in 0..blocks {
        file.write_all(&journal::block(number)).and_then(|()| file.sync_all()).map_err(text)?;
        say(&format!("journal: synced {number}."));
    }
    Ok("all is written".into())
}

/// Reads the journal `TAG/FILE`.
pub fn read_journal(argument: &str) -> Outcome {
    let path = granted(argument)?;
    Ok(format!("{} whole blocks", journal::whole_blocks(&path).map_err(text)?))
}

/// How often [`hoard`] opens a file.
const HOARD: u32 = 100_000;
/// After so many refusals it gives up: each takes as long as an open file.
const ENOUGH: u32 = 1000;

/// Opens `TAG/FILE` as often as it can, and once more when it has closed all of them.
pub fn hoard(argument: &str) -> Outcome {
    let path = granted(argument)?;
    let limit = Some(u64::from(HOARD) * 2);
    setrlimit(Resource::Nofile, Rlimit { current: limit, maximum: limit }).map_err(text)?;
    let (mut open, mut refused) = (Vec::new(), BTreeMap::<String, u32>::new());
    for _ in 0..HOARD {
        if refused.values().sum::<u32>() == ENOUGH {
            break;
        }
        match File::open(&path) {
            Ok(file) => open.push(file),
            Err(e) => *refused.entry(e.to_string()).or_default() += 1,
        }
    }
    let opened = open.len();
    drop(open);
    File::open(&path).map_err(text)?;
    Ok(format!("{opened} open, then {refused:?}"))
}

/// Mounts the file system of this tag and does what the console says until it says `end`.
///
/// `read FILE`, `write FILE MIB`, `stat DIRECTORY` and `ask FILE COUNT` are answered with what was done and the
/// nanoseconds that it took.
pub fn serve(tag: &str) -> Outcome {
    mounted(tag)?;
    say("files: ready");
    for line in io::stdin().lock().lines() {
        let line = line.map_err(text)?;
        let mut words = line.split_whitespace();
        let (order, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let (path, count) = (format!("{PLACE}/{path}"), words.next().and_then(|n| n.parse().ok()).unwrap_or(0));
        let (done, time) = match order {
            "read" => read(&path),
            "write" => write(&path, count),
            "stat" => stat(&path),
            "ask" => ask(&path, count),
            _ => return Ok("ended".into()),
        }
        .map_err(|e| format!("{line}: {e}"))?;
        say(&format!("files: did {done} in {} ns", time.as_nanos()));
    }
    Err("the console ended".into())
}

/// Forgets pages, names and attributes that nobody uses.
fn forget() -> io::Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3\n")
}

fn read(path: &str) -> io::Result<(u64, Duration)> {
    forget()?;
    let (mut file, mut chunk, mut bytes) = (File::open(path)?, vec![0; CHUNK], 0);
    let start = Instant::now();
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok((bytes, start.elapsed())),
            n => bytes += n as u64,
        }
    }
}

fn write(path: &str, mib: u64) -> io::Result<(u64, Duration)> {
    forget()?;
    let (mut file, chunk) = (File::create(path)?, vec![0x5a; CHUNK]);
    let start = Instant::now();
    (0..mib).try_for_each(|_| file.write_all(&chunk))?;
    Ok((mib << 20, start.elapsed()))
}

/// Names and attributes of all that is in a directory, none of which the guest knows yet.
fn stat(path: &str) -> io::Result<(u64, Duration)> {
    let names = fs::read_dir(path)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    forget()?;
    let start = Instant::now();
    names.iter().try_for_each(|name| fs::symlink_metadata(name).map(drop))?;
    Ok((names.len() as u64, start.elapsed()))
}

/// The attributes of one file that is known, asked for anew each time: what a round trip takes.
fn ask(path: &str, count: u64) -> io::Result<(u64, Duration)> {
    let start = Instant::now();
    for _ in 0..count {
        statx(CWD, path, AtFlags::STATX_FORCE_SYNC, StatxFlags::BASIC_STATS)?;
    }
    Ok((count, start.elapsed()))
}
