//! Garbage for every register and ring of the machine's devices.
//!
//! What is written is random, but for what would only harm this guest itself: devices are shown pages set aside for it or
//! addresses where no RAM is, and no interrupt message is forged. So the guest lives to say how the machine is afterwards.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::board::Board;
use crate::graphics;
use crate::region::{Arena, PAGE, Region};
use crate::{Outcome, say};

const DEVICES: &str = "/sys/bus/pci/devices";
const DRIVER: &str = "/sys/bus/pci/drivers/virtio-pci";

/// Offsets of BAR 0, as the capabilities of every device here say.
const STATUS: usize = 0x14;
const QUEUE_SELECT: usize = 0x16;
const QUEUE_DESC: usize = 0x20;
const QUEUE_DRIVER: usize = 0x28;
const QUEUE_DEVICE: usize = 0x30;
const END_OF_COMMON: usize = 0x38;
const NOTIFY: usize = 0x3000;
const MSIX_TABLE: usize = 0x6000;
const MSIX_PBA: usize = 0x7000;
/// Where no guest of these tests has RAM.
const NO_RAM: u64 = 0xc000_0000;

/// xorshift64*: the same garbage every time.
pub struct Random(u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn word(&mut self) -> u32 {
        u32::try_from(self.next() >> 32).unwrap_or(0)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap_or(0) % limit.max(1)
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn width(&mut self) -> usize {
        1 << self.below(4)
    }
}

pub fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A virtio function without a driver.
struct Function {
    name: String,
    id: u16,
    /// Slot and function number, as addresses of configuration space have them.
    place: u16,
    config: File,
    saved: Vec<u8>,
    bar: Region,
    queues: usize,
    /// Offset of the capability through which configuration space reaches BARs.
    window: Option<usize>,
}

impl Function {
    /// Takes a function from its driver.
    fn take(path: &Path) -> Result<Self, String> {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let place = place(&name)?;
        let id = fs::read_to_string(path.join("device")).map_err(text)?;
        let id = u16::from_str_radix(id.trim().trim_start_matches("0x"), 16).map_err(text)?;
        if path.join("driver").exists() {
            fs::write(path.join("driver/unbind"), &name).map_err(text)?;
        }
        fs::write(path.join("enable"), "1").map_err(text)?;
        let config = OpenOptions::new().read(true).write(true).open(path.join("config")).map_err(text)?;
        let mut saved = vec![0; 256];
        config.read_exact_at(&mut saved, 0).map_err(text)?;
        // Memory space and bus master on.
        config.write_all_at(&[6, 0], 4).map_err(text)?;
        let resource = OpenOptions::new().read(true).write(true).open(path.join("resource0")).map_err(text)?;
        let len = usize::try_from(resource.metadata().map_err(text)?.len()).map_err(text)?;
        let bar = Region::map(&resource, 0, len)?;
        let queues = usize::try_from(bar.read(0x12, 2)).map_err(text)?;
        let window = capabilities(&saved).find(|&at| saved.get(at) == Some(&9) && saved.get(at + 3) == Some(&5));
        Ok(Self { name, id, place, config, saved, bar, queues, window })
    }

    /// Resets the device and gives it back to its driver.
    fn give_back(self) -> Result<(), String> {
        self.bar.write(STATUS, 1, 0);
        if self.bar.read(STATUS, 1) != 0 {
            return Err(format!("{} does not reset", self.name));
        }
        // Command; everything else that can be written is the driver's to set.
        self.config.write_all_at(self.saved.get(4..6).unwrap_or_default(), 4).map_err(text)?;
        fs::write(Path::new(DEVICES).join(&self.name).join("enable"), "0").map_err(text)?;
        fs::write(Path::new(DRIVER).join("bind"), &self.name).map_err(|e| format!("binding {}: {e}", self.name))
    }
}

/// Slot and function number in a name like `0000:00:03.0`.
fn place(name: &str) -> Result<u16, String> {
    let (slot, function) = name.rsplit_once(':').and_then(|(_, tail)| tail.split_once('.')).ok_or("no PCI address")?;
    Ok(u16::from_str_radix(slot, 16).map_err(text)? << 3 | function.parse::<u16>().map_err(text)?)
}

fn capabilities(config: &[u8]) -> impl Iterator<Item = usize> {
    let next = |at: usize| config.get(at).map(|&at| usize::from(at)).filter(|&at| at != 0);
    std::iter::successors(next(0x34), move |&at| next(at + 1)).take(48)
}

/// What garbage is made with.
struct Attack {
    random: Random,
    arena: Arena,
    board: Board,
    accesses: u64,
    /// Requests the graphics device has answered.
    answers: u64,
}

impl Attack {
    /// An address for a device: a place in the arena, or where no RAM is.
    fn address(&mut self, align: usize) -> u64 {
        let random = self.random.next();
        match self.random.below(8) {
            0 => u64::MAX - (random & 0xffff),
            1 => NO_RAM + (random & 0x3fff_ffff),
            2 => random | 1 << 40,
            _ => {
                let page = self.random.below(self.arena.pages());
                self.arena.physical(page) + (self.random.below(PAGE) / align * align) as u64
            }
        }
    }

    /// A descriptor: address, length, flags, next.
    fn descriptor(&mut self) -> [u64; 2] {
        let address = self.address(16);
        let mut len = match self.random.below(4) {
            0 => self.random.next() & 0xffff_ffff,
            _ => self.random.next() & 0x1ff,
        };
        if address < NO_RAM {
            // A device may be told to write there.
            len = len.min(PAGE as u64 - address % PAGE as u64);
        }
        // Next, write, indirect: often as they should be.
        let flags = if self.random.one_in(4) { self.random.next() & 0xffff } else { self.random.next() & 0x3 };
        let flags = if self.random.one_in(6) { 4 } else { flags };
        let next = self.random.next() & if self.random.one_in(4) { 0xffff } else { 0x1f };
        [address, len | flags << 32 | next << 48]
    }

    fn fill_rings(&mut self) {
        for slot in 0..self.arena.pages() * PAGE / 16 {
            let [low, high] = self.descriptor();
            self.arena.bytes().write(slot * 16, 8, low);
            self.arena.bytes().write(slot * 16 + 8, 8, high);
        }
    }

    /// A value for the register at `offset` of BAR 0.
    fn value(&mut self, offset: usize, width: usize) -> u64 {
        let random = self.random.next();
        match offset {
            QUEUE_DESC..END_OF_COMMON if width == 4 && offset.is_multiple_of(8) => self.address(16),
            QUEUE_DESC..END_OF_COMMON if width == 4 => random & 0xffff | u64::from(self.random.one_in(2)),
            QUEUE_DESC..END_OF_COMMON => self.address(if random & 1 == 0 { 16 } else { 1 }),
            // Not the local APICs' addresses.
            MSIX_TABLE..MSIX_PBA if offset % 16 < 8 => random & !0xf000_0000_f000_0000,
            _ => random,
        }
    }

    /// A random access to BAR 0.
    fn register(&mut self, function: &Function) {
        let offset = match self.random.below(8) {
            0..4 => self.random.below(END_OF_COMMON),
            4 => 0x2000 + self.random.below(0x40),
            5 => NOTIFY + self.random.below(4 * function.queues + 8),
            6 => MSIX_TABLE + self.random.below(16 * function.queues + 32),
            _ => self.random.below(function.bar.len()),
        };
        let width = self.random.width();
        let offset = offset / width * width;
        self.accesses += 1;
        if self.random.one_in(3) {
            function.bar.read(offset, width);
        } else {
            let value = self.value(offset, width);
            function.bar.write(offset, width, value);
        }
    }

    /// A random access to configuration space, by any of the ways there; now and then to a BAR by that way.
    fn configuration(&mut self, function: &Function) {
        let mut bytes = [0; 4];
        let width = 1 << self.random.below(3);
        let at = self.random.below(256) / width * width;
        let part = bytes.get_mut(..width).unwrap_or_default();
        self.accesses += 1;
        if self.random.one_in(3) {
            let _ = function.config.read_at(part, at as u64);
            self.board.read_config(&mut self.random, function.place, at, width);
            return;
        }
        if let Some(window) = function.window.filter(|_| self.random.one_in(3)) {
            let width = self.random.width();
            let offset = self.random.below(END_OF_COMMON) / width * width;
            let value = self.value(offset, width);
            let word = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(0).to_le_bytes();
            for (at, bytes) in [(4, word(0)), (8, word(offset as u64)), (12, word(width as u64)), (16, word(value))] {
                let _ = function.config.write_at(&bytes, (window + at) as u64);
            }
            return;
        }
        // The window's data would go to a register that some earlier garbage named.
        if function.window.is_none_or(|window| at / 4 * 4 != window + 16) {
            if self.random.one_in(2) {
                self.board.write_config(&mut self.random, function.place, at, width);
                return;
            }
            part.iter_mut().for_each(|byte| *byte = u8::try_from(self.random.next() & 0xff).unwrap_or(0));
            let _ = function.config.write_at(part, at as u64);
        }
    }

    /// Resets the device and agrees on features with it, as a driver does.
    fn negotiate(&mut self, bar: &Region, careless: bool) {
        bar.write(STATUS, 1, 0);
        bar.write(STATUS, 1, 3);
        for half in 0..2 {
            bar.write(0, 4, half);
            let offered = bar.read(4, 4);
            let random = self.random.next();
            bar.write(8, 4, half);
            // VERSION_1 is bit 0 of the upper half.
            let some = careless && self.random.one_in(4);
            bar.write(12, 4, if some { offered & random | half } else { offered });
        }
        bar.write(STATUS, 1, 11);
    }

    /// Starts the device as a driver does, on rings full of garbage, and rings the doorbells.
    fn start(&mut self, function: &Function) {
        let bar = &function.bar;
        self.negotiate(bar, true);
        self.fill_rings();
        for queue in 0..function.queues {
            bar.write(QUEUE_SELECT, 2, queue as u64);
            bar.write(0x18, 2, 1 << self.random.below(9));
            for (ring, align) in [(QUEUE_DESC, 16), (QUEUE_DRIVER, 2), (QUEUE_DEVICE, 4)] {
                let page = self.random.below(self.arena.pages());
                let offset = self.random.below(PAGE / 2) / align * align;
                let address = if self.random.one_in(16) {
                    self.address(align)
                } else {
                    self.arena.physical(page) + offset as u64
                };
                bar.write(ring, 8, address);
                if ring == QUEUE_DRIVER {
                    // A plausible index, so that the device takes what is offered.
                    self.arena.bytes().write(page * PAGE + offset, 2, 0);
                    self.arena.bytes().write(page * PAGE + offset + 2, 2, self.random.next() & 0x3f);
                }
            }
            bar.write(0x1c, 2, 1);
        }
        bar.write(STATUS, 1, 15);
        for _ in 0..16 {
            let queue = self.random.below(function.queues.max(1));
            bar.write(NOTIFY + 4 * queue, 2, queue as u64);
            let slot = self.random.below(self.arena.pages() * PAGE / 16);
            let [low, high] = self.descriptor();
            self.arena.bytes().write(slot * 16, 8, low);
            self.arena.bytes().write(slot * 16 + 8, 8, high);
        }
        self.accesses += 64;
    }

    /// Starts the graphics device on a ring as it should be, with requests that are nearly so: garbage alone is turned
    /// away before it comes to anything.
    fn graphics(&mut self, function: &Function) {
        const DESC: usize = 0;
        const DRIVER: usize = PAGE;
        const DEVICE: usize = 2 * PAGE;
        const ANSWERS: usize = 3;
        const REQUESTS: usize = 4;
        let (bar, count) = (&function.bar, (self.arena.pages() - REQUESTS) * PAGE / graphics::SLOT);
        self.negotiate(bar, false);
        let memory = self.arena.bytes();
        for number in 0..count {
            let at = REQUESTS * PAGE + number * graphics::SLOT;
            let page = self.random.below(self.arena.pages() - REQUESTS) + REQUESTS;
            let len = graphics::request(&mut self.random, memory, at, self.arena.physical(page));
            // One descriptor with the request, one for the answer: flags NEXT and WRITE.
            let from = self.arena.physical(at / PAGE) + (at % PAGE) as u64;
            for (index, low, high) in [
                (2 * number, from, len | 1 << 32 | (2 * number as u64 + 1) << 48),
                (2 * number + 1, self.arena.physical(ANSWERS), PAGE as u64 | 2 << 32),
            ] {
                memory.write(DESC + 16 * index, 8, low);
                memory.write(DESC + 16 * index + 8, 8, high);
            }
            memory.write(DRIVER + 4 + 2 * number, 2, 2 * number as u64);
        }
        memory.write(DRIVER, 2, 0);
        memory.write(DRIVER + 2, 2, count as u64);
        memory.write(DEVICE, 4, 0);
        bar.write(QUEUE_SELECT, 2, 0);
        bar.write(0x18, 2, 256);
        for (ring, at) in [(QUEUE_DESC, DESC), (QUEUE_DRIVER, DRIVER), (QUEUE_DEVICE, DEVICE)] {
            bar.write(ring, 8, self.arena.physical(at / PAGE));
        }
        bar.write(0x1c, 2, 1);
        bar.write(STATUS, 1, 15);
        bar.write(NOTIFY, 2, 0);
        // Not until all are answered: some wait for what never happens. Each look gives the device some time.
        for _ in 0..64 {
            if memory.read(DEVICE + 2, 2) >= count as u64 / 2 {
                break;
            }
            bar.read(STATUS, 1);
        }
        self.answers += memory.read(DEVICE + 2, 2);
        self.accesses += 32;
    }

    fn attack(&mut self, function: &Function) {
        match self.random.below(16) {
            0 if function.id == graphics::DEVICE && self.random.one_in(2) => self.graphics(function),
            0 => self.start(function),
            1..4 => self.configuration(function),
            _ => self.register(function),
        }
    }
}

fn all() -> Result<Vec<PathBuf>, String> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(DEVICES).map_err(text)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    Ok(paths)
}

/// Places of all functions there are.
fn places() -> Result<Vec<u16>, String> {
    all()?.iter().map(|path| place(&path.file_name().unwrap_or_default().to_string_lossy())).collect()
}

fn functions(wanted: impl Fn(u16) -> bool) -> Result<Vec<Function>, String> {
    let mut functions = Vec::new();
    for path in all()? {
        let read = |name: &str| fs::read_to_string(path.join(name)).unwrap_or_default();
        let id = u16::from_str_radix(read("device").trim().trim_start_matches("0x"), 16).unwrap_or(0);
        if read("vendor").trim() == "0x1af4" && wanted(id) {
            functions.push(Function::take(&path)?);
        }
    }
    Ok(functions)
}

/// Virtio's number for the entropy device, as a PCI device number.
const ENTROPY: u16 = 0x1044;

/// Half of `seconds` against all devices but the entropy device, which must answer all the while; then the rest against
/// that one. The interrupt controller and configuration space have their share in both.
pub fn garbage(seconds: &str) -> Outcome {
    let seconds: u64 = seconds.parse().map_err(text)?;
    let board = Board::new(places()?)?;
    let mut attack = Attack { random: Random(0x5eed), arena: Arena::new(16)?, board, accesses: 0, answers: 0 };
    let mut entropy = File::open("/dev/hwrng").map_err(text)?;
    let others = functions(|id| id != ENTROPY)?;
    let names: Vec<String> = others.iter().map(|f| format!("{:#x}", f.id)).collect();
    say(&format!("garbage: begins with {}", names.join(" ")));
    round(&mut attack, &others, seconds, || entropy.read_exact(&mut [0; 4]).map_err(text))?;
    others.into_iter().try_for_each(Function::give_back)?;
    drop(entropy);
    say(&format!("garbage: {} requests answered by the graphics device", attack.answers));
    say("garbage: the entropy device");
    let entropy = functions(|id| id == ENTROPY)?;
    round(&mut attack, &entropy, seconds, || Ok(()))?;
    entropy.into_iter().try_for_each(Function::give_back)?;
    ports(&mut attack.random)?;
    Ok(format!("{} accesses", attack.accesses))
}

fn round(
    attack: &mut Attack,
    functions: &[Function],
    seconds: u64,
    mut meanwhile: impl FnMut() -> Result<(), String>,
) -> Result<(), String> {
    let end = Instant::now() + Duration::from_secs(seconds) / 2;
    attack.board.remember();
    while Instant::now() < end {
        for _ in 0..32 {
            let chosen = attack.random.below(functions.len());
            if let Some(function) = functions.get(chosen) {
                attack.attack(function);
            }
            attack.board.attack(&mut attack.random);
            attack.accesses += 1;
        }
        meanwhile()?;
    }
    attack.board.restore()
}

/// I/O ports beside the serial port's, which this guest needs to say how it went: all values but the two that end it.
fn ports(random: &mut Random) -> Result<(), String> {
    let port = OpenOptions::new().read(true).write(true).open("/dev/port").map_err(text)?;
    for _ in 0..1000 {
        let number = match random.below(4) {
            0 => 0x600 + random.below(4),
            1 => 0x80,
            2 => 0xcf9 + random.below(3),
            _ => 0x1000 + random.below(0xe000),
        };
        let value = u8::try_from(random.next() & 0xff).unwrap_or(0);
        if matches!((number, value), (0x600, 0x34) | (0x602, 1)) {
            continue;
        }
        let _ = port.read_at(&mut [0; 1], number as u64);
        let _ = port.write_at(&[value], number as u64);
    }
    Ok(())
}
