//! The one thing a BIOS would still be good for: the code at the reset vector.
//!
//! Linux takes the reset register of the FADT for unreliable on hardware-reduced machines and, finding no EFI either, goes
//! back to real mode and jumps to the reset vector (`native_machine_emergency_restart`, type `BOOT_BIOS`).

use super::layout::{HIGH_RAM_START, RESET_VECTOR, port};

/// Real-mode code for [`RESET_VECTOR`]: writes the reset register.
pub const CODE: [u8; 9] = {
    let [low, high] = port::RESET.to_le_bytes();
    [
        0xba,
        low,
        high, // mov dx, RESET
        0xb0,
        port::RESET_VALUE, // mov al, RESET_VALUE
        0xee,              // out dx, al
        0xf4,              // hlt
        0xeb,
        0xfd, // jmp to hlt
    ]
};

const _: () = assert!(RESET_VECTOR + CODE.len() as u64 <= HIGH_RAM_START);
