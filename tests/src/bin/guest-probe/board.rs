//! Garbage for what has no driver to take it from: the I/O APIC, and PCI configuration space by both of its ways.

use crate::hostile::Random;
use crate::region::{PAGE, Ports, Region};

/// Where they are, as the ACPI tables of these machines say.
const IOAPIC: u64 = 0xfec0_0000;
const ECAM: u64 = 0xe800_0000;
const ECAM_SIZE: usize = 1 << 20;
const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
/// Pins of the I/O APIC, and the two on which edges come: serial port and event device.
const PINS: usize = 24;
const LIVE: [usize; 2] = [4, 5];

/// Registers of the I/O APIC (Intel 82093AA datasheet).
const SELECT: usize = 0x00;
const WINDOW: usize = 0x10;
const ID: u8 = 0;
const TABLE: u8 = 0x10;
const MASKED: u64 = 1 << 16;
/// A redirection entry's delivery mode and vector.
const MESSAGE: u64 = 0x7ff;

const ADDRESS_ENABLE: u32 = 1 << 31;

/// The machine's parts without drivers.
pub struct Board {
    ioapic: Region,
    ecam: Region,
    ports: Ports,
    /// Where functions are that others may be using.
    functions: Vec<u16>,
    /// The register of the I/O APIC that is selected.
    selected: u8,
    id: u64,
    /// The redirection entries as the kernel left them, low and high half.
    entries: Vec<[u64; 2]>,
}

fn half(pin: usize, high: bool) -> u8 {
    u8::try_from(2 * pin + usize::from(high)).map_or(ID, |at| TABLE.wrapping_add(at))
}

impl Board {
    /// `functions` are left alone, but for the host bridge.
    pub fn new(functions: Vec<u16>) -> Result<Self, String> {
        Ok(Self {
            ioapic: Region::physical(IOAPIC, PAGE)?,
            ecam: Region::physical(ECAM, ECAM_SIZE)?,
            ports: Ports::take()?,
            functions,
            selected: 0,
            id: 0,
            entries: Vec::new(),
        })
    }

    fn select(&mut self, register: u8) {
        self.ioapic.write(SELECT, 4, register.into());
        self.selected = register;
    }

    fn get(&mut self, register: u8) -> u64 {
        self.select(register);
        self.ioapic.read(WINDOW, 4)
    }

    fn set(&mut self, register: u8, value: u64) {
        self.select(register);
        self.ioapic.write(WINDOW, 4, value);
    }

    /// Keeps the I/O APIC's registers for [`Board::restore`].
    pub fn remember(&mut self) {
        self.id = self.get(ID);
        self.entries = (0..PINS).map(|pin| [false, true].map(|high| self.get(half(pin, high)))).collect();
    }

    /// Puts the I/O APIC's registers back; an edge that came while its pin was masked is delivered by that.
    pub fn restore(&mut self) -> Result<(), String> {
        self.set(ID, self.id);
        for (pin, [low, high]) in std::mem::take(&mut self.entries).into_iter().enumerate() {
            self.set(half(pin, false), MASKED);
            self.set(half(pin, true), high);
            self.set(half(pin, false), low);
            let now = [false, true].map(|high| self.get(half(pin, high)));
            if now != [low, high] {
                return Err(format!("pin {pin} of the I/O APIC is {now:x?} instead of {:x?}", [low, high]));
            }
        }
        Ok(())
    }

    /// One access to some part.
    pub fn attack(&mut self, random: &mut Random) {
        match random.below(3) {
            0 => self.interrupts(random),
            1 => self.nowhere(random),
            _ => self.legacy(random),
        }
    }

    fn interrupts(&mut self, random: &mut Random) {
        let offset = match random.below(8) {
            0..3 => SELECT,
            3..7 => WINDOW,
            _ => random.below(PAGE),
        };
        let width = random.width();
        let offset = offset / width * width;
        if random.one_in(4) {
            self.ioapic.read(offset, width);
            return;
        }
        let mut value = random.next();
        if offset == SELECT {
            value = if random.one_in(4) { value } else { value & !0xff | random.below(0x48) as u64 };
            self.selected = u8::try_from(value & 0xff).unwrap_or(0);
        }
        // No edge may become an INIT, an NMI or a vector that is an exception's.
        if offset == WINDOW && LIVE.iter().any(|pin| half(*pin, false) == self.selected) {
            value = value & !MESSAGE | 0x40 | random.below(0x40) as u64;
        }
        self.ioapic.write(offset, width, value);
    }

    /// A place where no function is, or the host bridge; `bits` are what its number may have.
    fn absent(&self, random: &mut Random, bits: u64) -> u16 {
        let place = u16::try_from(random.next() & bits).unwrap_or(0);
        if random.one_in(4) || self.functions.contains(&place) { 0 } else { place }
    }

    /// An access to the memory-mapped configuration space that reaches no driver's function.
    fn nowhere(&mut self, random: &mut Random) {
        let (width, place) = (random.width(), self.absent(random, 0xff));
        let register = random.below(PAGE) / width * width;
        let offset = usize::from(place) << 12 | register;
        if random.one_in(3) {
            self.ecam.read(offset, width);
        } else {
            self.ecam.write(offset, width, random.next());
        }
    }

    /// Accesses to the configuration ports, of any width and place, that reach no driver's function.
    fn legacy(&mut self, random: &mut Random) {
        let enable = if random.one_in(4) { 0 } else { ADDRESS_ENABLE };
        let rest = random.word() & 0x7f00_00ff;
        self.ports.write(CONFIG_ADDRESS, 4, enable | rest | u32::from(self.absent(random, 0xffff)) << 8);
        for _ in 0..4 {
            let width = 1 << random.below(3);
            let offset = u16::try_from(random.below(8)).unwrap_or(0);
            if random.one_in(3) {
                self.ports.read(CONFIG_ADDRESS + offset, width);
            } else if (offset, width) != (0, 4) {
                // Anything but another address.
                self.ports.write(CONFIG_ADDRESS + offset, width, random.word());
            }
        }
    }

    fn address(&self, place: u16, at: usize) -> u16 {
        let at = u16::try_from(at).unwrap_or(0);
        let address = ADDRESS_ENABLE | u32::from(place) << 8 | u32::from(at & 0xfc);
        self.ports.write(CONFIG_ADDRESS, 4, address);
        CONFIG_DATA + (at & 3)
    }

    /// Reads a function's configuration space past the kernel.
    pub fn read_config(&self, random: &mut Random, place: u16, at: usize, width: usize) {
        if random.one_in(2) {
            self.ecam.read(usize::from(place) << 12 | at, width);
        } else {
            self.ports.read(self.address(place, at), width);
        }
    }

    /// Writes garbage to a function's configuration space past the kernel.
    pub fn write_config(&self, random: &mut Random, place: u16, at: usize, width: usize) {
        if random.one_in(2) {
            self.ecam.write(usize::from(place) << 12 | at, width, random.next());
        } else {
            self.ports.write(self.address(place, at), width, random.word());
        }
    }
}
