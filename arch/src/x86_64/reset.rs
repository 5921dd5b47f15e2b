//! What is at the reset vector in low memory: code that resets the machine.
//!
//! A hardware-reduced ACPI system is taken by Linux for one with UEFI: it does not use the reset register to reboot, but
//! asks EFI, and where there is none it jumps in real mode to where a BIOS begins.

use super::layout::port;

/// Guest physical address of the first instruction a BIOS executes, `ffff:0000` in real mode.
pub const VECTOR: u64 = 0xffff0;

/// Writes the reset value to the reset register: `mov dx, port; mov al, value; out dx, al; hlt; jmp $-1`.
#[must_use]
pub const fn code() -> [u8; 9] {
    let [low, high] = port::RESET.to_le_bytes();
    [0xba, low, high, 0xb0, port::RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
}
