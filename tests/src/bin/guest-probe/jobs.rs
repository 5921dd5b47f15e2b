//! The jobs.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::thread::available_parallelism;
use std::time::Instant;

use rustix::system::RebootCommand;

use crate::region::{PAGE, Region};
use crate::{Outcome, end, say};

/// Does one job. `NAME` or `NAME=ARGUMENT`.
pub fn run(job: &str) -> Outcome {
    let (name, argument) = job.split_once('=').unwrap_or((job, ""));
    match name {
        "cpus" => cpus(),
        "echo" => echo(),
        "tick" => tick(),
        "reboot-once" => reboot_once(argument),
        "power-button" => power_button(),
        "entropy" => entropy(),
        "generation" => generation(),
        "image" => image(argument),
        "overwrite" => overwrite(argument),
        "write" => write_device(argument),
        "churn" => churn(argument),
        "refused" => refused(argument),
        "files" => crate::files::serve(argument),
        "journal" => crate::files::write_journal(argument),
        "read-journal" => crate::files::read_journal(argument),
        "hoard" => crate::files::hoard(argument),
        "graphics" => crate::graphics::capabilities(),
        "vsock-hold" => crate::vsock::hold(argument),
        "vsock-connect" => crate::vsock::connect(argument),
        "vsock-listen" => crate::vsock::listen(argument),
        "garbage" => crate::hostile::garbage(argument),
        _ => Err("there is no such job".into()),
    }
}

pub fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// How many CPUs run, by the kernel's count and by the scheduler's.
fn cpus() -> Outcome {
    let online = fs::read_to_string("/sys/devices/system/cpu/online").map_err(text)?;
    Ok(format!("{} online, {} usable", online.trim(), available_parallelism().map_err(text)?))
}

/// Says what is typed on the console.
fn echo() -> Outcome {
    say("echo: type");
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line).map_err(text)?;
    Ok(line.trim_end().to_owned())
}

/// Counts for ever, as fast as the console takes it.
fn tick() -> Outcome {
    let mut out = io::stdout();
    for count in 0u32.. {
        writeln!(out, "tick {count:08x}").map_err(text)?;
    }
    Err("the numbers ended".into())
}

/// On a device that remembers: counts the boots in its first four bytes and restarts at the first.
fn reboot_once(device: &str) -> Outcome {
    let mut file = OpenOptions::new().read(true).write(true).open(device).map_err(text)?;
    let mut count = [0; 4];
    file.read_exact(&mut count).map_err(text)?;
    let boots = u32::from_le_bytes(count).wrapping_add(1);
    file.seek(SeekFrom::Start(0)).map_err(text)?;
    file.write_all(&boots.to_le_bytes()).map_err(text)?;
    file.sync_all().map_err(text)?;
    if boots == 1 {
        say("reboot-once: restarting");
        end(RebootCommand::Restart);
    }
    Ok(format!("boot {boots}"))
}

const EVENT_SIZE: usize = 24;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// Waits until the power button is pressed.
fn power_button() -> Outcome {
    let mut event = File::open(power_button_device()?).map_err(text)?;
    say("power-button: waiting");
    loop {
        // struct input_event: two words of time, type, code, value.
        let mut bytes = [0; EVENT_SIZE];
        event.read_exact(&mut bytes).map_err(text)?;
        let [.., t0, t1, c0, c1, value, _, _, _] = bytes;
        if (u16::from_le_bytes([t0, t1]), u16::from_le_bytes([c0, c1]), value) == (EV_KEY, KEY_POWER, 1) {
            return Ok("pressed".into());
        }
    }
}

fn power_button_device() -> Result<PathBuf, String> {
    for entry in fs::read_dir("/sys/class/input").map_err(text)? {
        let path = entry.map_err(text)?.path();
        let name = fs::read_to_string(path.join("device/name")).unwrap_or_default();
        let file = path.file_name().unwrap_or_default();
        if name.trim() == "Power Button" && file.to_string_lossy().starts_with("event") {
            return Ok(PathBuf::from("/dev/input").join(file));
        }
    }
    Err("no input device is called Power Button".into())
}

/// Some bytes of the host's entropy, in hexadecimal.
fn entropy() -> Outcome {
    let mut bytes = [0; 32];
    File::open("/dev/hwrng").and_then(|mut f| f.read_exact(&mut bytes)).map_err(text)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// The kernel's driver of the VM generation ID, and the ID as it is in memory.
fn generation() -> Outcome {
    // Linux 6.10 made an ACPI driver a platform driver.
    let places = ["acpi", "platform"].map(|bus| format!("/sys/bus/{bus}/devices/VMGENCTR:00"));
    let driver = places.iter().find_map(|place| fs::read_link(format!("{place}/driver")).ok());
    let driver = driver.ok_or("no driver has the device")?;
    let memory = fs::read_to_string("/proc/iomem").map_err(text)?;
    let reserved = memory.lines().any(|line| line.trim() == "000ff000-000fffff : Reserved");
    let memory = OpenOptions::new().read(true).write(true).open("/dev/mem").map_err(text)?;
    let page = Region::map(memory, 0xf_f000, PAGE)?;
    Ok(format!(
        "{} {}reserved {:016x}{:016x}",
        driver.file_name().unwrap_or_default().display(),
        if reserved { "" } else { "not " },
        page.read(0, 8),
        page.read(8, 8)
    ))
}

/// Reads a device of 8-byte words that count up, with zeros behind them: its size, the number of words, and what is
/// behind.
fn image(device: &str) -> Outcome {
    let mut file = File::open(device).map_err(text)?;
    let (mut words, mut zeros, mut chunk) = (0u64, 0u64, vec![0; 1 << 16]);
    let mut size = 0;
    loop {
        let n = file.read(&mut chunk).map_err(text)?;
        if n == 0 {
            break;
        }
        size += n;
        for word in chunk.get(..n).unwrap_or_default().chunks(8) {
            let word = u64::from_le_bytes(word.try_into().map_err(text)?);
            match word {
                0 if words > 0 => zeros += 8,
                _ if zeros == 0 && word == words => words += 1,
                _ => return Err(format!("{word:#x} after {words} words and {zeros} zeros")),
            }
        }
    }
    Ok(format!("{size} bytes, {words} words, {zeros} zeros"))
}

const MARK: &[u8; 16] = b"written by guest";

/// Writes a mark at the start of a device and reads it back past the page cache.
fn overwrite(device: &str) -> Outcome {
    let mut file = OpenOptions::new().read(true).write(true).open(device).map_err(text)?;
    file.write_all(MARK).map_err(text)?;
    file.sync_all().map_err(text)?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).map_err(text)?;
    file.seek(SeekFrom::Start(0)).map_err(text)?;
    let mut back = [0; 16];
    file.read_exact(&mut back).map_err(text)?;
    Ok(String::from_utf8_lossy(&back).into_owned())
}

/// How often [`churn`] goes round.
const ROUNDS: u32 = 150;

/// Writes blocks of a device and reads them back past the page cache, over and over, and looks whether the clock ever
/// goes backwards; says which round it is in.
fn churn(device: &str) -> Outcome {
    let mut file = OpenOptions::new().read(true).write(true).open(device).map_err(text)?;
    let (mut back, mut last) = (vec![0; 1 << 16], Instant::now());
    for round in 1..=ROUNDS {
        let at = SeekFrom::Start(u64::from(round % 8) << 16);
        let bytes: Vec<u8> = (0u32..1 << 14).flat_map(|word| (word ^ round << 16).to_le_bytes()).collect();
        file.seek(at).and_then(|_| file.write_all(&bytes)).and_then(|()| file.sync_all()).map_err(text)?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).map_err(text)?;
        file.seek(at).and_then(|_| file.read_exact(&mut back)).map_err(text)?;
        let now = Instant::now();
        if back != bytes || now < last {
            return Err(format!("round {round}: other bytes, or {now:?} after {last:?}"));
        }
        last = now;
        say(&format!("churn: round {round}."));
    }
    Ok("all rounds".into())
}

/// Says how writing to a device that is read-only fails.
fn refused(device: &str) -> Outcome {
    let file = OpenOptions::new().write(true).open(device);
    match file.and_then(|mut file| file.write_all(MARK).and_then(|()| file.sync_all())) {
        Ok(()) => Err("it was not".into()),
        Err(e) => Ok(e.to_string()),
    }
}

/// Writes a line to a terminal: `DEVICE`.
fn write_device(device: &str) -> Outcome {
    let mut file = OpenOptions::new().write(true).open(device).map_err(text)?;
    file.write_all(b"hello from the guest\n").map_err(text)?;
    rustix::termios::tcdrain(&file).map_err(text)?;
    Ok("done".into())
}
