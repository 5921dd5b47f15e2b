//! A guest of a few bytes, as a PVH kernel: it counts on the serial port for ever.

use std::path::Path;

/// Where the program is loaded and starts.
const ENTRY: u32 = 0x10_0000;
/// The kind of the note that holds a PVH entry (`XEN_ELFNOTE_PHYS32_ENTRY`).
const PVH_ENTRY: u32 = 18;

/// Prints `tick` and a hexadecimal number, one higher in each line, as fast as it can. 32-bit protected mode, no stack.
#[rustfmt::skip]
const COUNTER: &[u8] = &[
    0x31, 0xdb,                         // xor ebx, ebx
    // next:
    0x66, 0xba, 0xf8, 0x03,             // mov dx, 0x3f8
    0xb0, b't', 0xee,                   // mov al, 't'; out dx, al
    0xb0, b'i', 0xee,
    0xb0, b'c', 0xee,
    0xb0, b'k', 0xee,
    0xb0, b' ', 0xee,
    0xb9, 0x1c, 0, 0, 0,                // mov ecx, 28
    // digit:
    0x89, 0xd8,                         // mov eax, ebx
    0xd3, 0xe8,                         // shr eax, cl
    0x24, 0x0f,                         // and al, 15
    0x3c, 0x0a,                         // cmp al, 10
    0x72, 0x02,                         // jb +2
    0x04, 0x27,                         // add al, 'a' - '0' - 10
    0x04, 0x30,                         // add al, '0'
    0xee,                               // out dx, al
    0x83, 0xe9, 0x04,                   // sub ecx, 4
    0x79, 0xec,                         // jns digit
    0xb0, b'\n', 0xee,
    0x43,                               // inc ebx
    0xeb, 0xce,                         // jmp next
];

/// Where guests that use much memory begin to use it.
const USED_FROM: u32 = 2 << 20;

/// Writes to each page of `size` bytes of memory but the first 2 MiB, and goes on behind itself.
fn fill(size: u32) -> Vec<u8> {
    let pages = (size - USED_FROM) / 4096;
    let [from, pages] = [USED_FROM, pages].map(u32::to_le_bytes);
    let mut code = Vec::new();
    code.push(0xbf); // mov edi, from
    code.extend(from);
    code.push(0xb9); // mov ecx, pages
    code.extend(pages);
    code.extend([0x89, 0x3f]); // page: mov [edi], edi
    code.extend([0x81, 0xc7, 0, 0x10, 0, 0]); // add edi, 4096
    code.extend([0x49, 0x75, 0xf5]); // dec ecx; jnz page
    code
}

/// Writes a kernel to `path` that writes to each page of its memory but the first 2 MiB, of `size` bytes, and then counts.
///
/// # Panics
/// If that fails.
pub fn write_filler(path: &Path, size: u32) {
    std::fs::write(path, elf(&[&fill(size), COUNTER].concat())).expect("the kernel can be written");
}

/// Jumps to where there is neither RAM nor a device, which no KVM can carry out.
#[rustfmt::skip]
const LOST: &[u8] = &[
    0xb8, 0, 0, 0, 0xd0,                // mov eax, 0xd0000000
    0xff, 0xe0,                         // jmp eax
];

/// Writes a kernel that cannot go on to `path`.
///
/// # Panics
/// If that fails.
pub fn write_lost(path: &Path) {
    std::fs::write(path, elf(LOST)).expect("the kernel can be written");
}

/// Writes the kernel to `path`.
///
/// # Panics
/// If that fails.
pub fn write_counter(path: &Path) {
    std::fs::write(path, elf(COUNTER)).expect("the kernel can be written");
}

/// Prints one byte and halts for ever: nothing after the first instructions costs time.
#[rustfmt::skip]
const ONE_BYTE: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03,             // mov dx, 0x3f8
    0xb0, b'!', 0xee,                   // mov al, '!'; out dx, al
    0xfa,                               // cli
    0xf4, 0xeb, 0xfd,                   // halt: hlt; jmp halt
];

/// Jumps to where no memory is: KVM cannot emulate that, as it cannot much of a kernel without the CPU's help.
#[rustfmt::skip]
const WILD_JUMP: &[u8] = &[
    0xb8, 0, 0, 0, 0xd0,                // mov eax, 0xd0000000
    0xff, 0xe0,                         // jmp eax
];

/// Writes the kernel that KVM cannot run to `path`.
///
/// # Panics
/// If that fails.
pub fn write_wild_jump(path: &Path) {
    std::fs::write(path, elf(WILD_JUMP)).expect("the kernel can be written");
}

/// Writes the kernel that prints one byte to `path`.
///
/// # Panics
/// If that fails.
pub fn write_one_byte(path: &Path) {
    std::fs::write(path, elf(ONE_BYTE)).expect("the kernel can be written");
}

/// How many pages [`TOUCH`] writes to.
pub const TOUCHED: u32 = (8 << 20) / 4096;

/// Over and over: reads from every page from 2 MiB to 256 MiB and prints a dot, writes to the first 8 MiB of them and prints
/// a colon. It needs no stack and runs at any address.
#[rustfmt::skip]
pub const TOUCH: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03,             // mov dx, 0x3f8
    // round:
    0xbf, 0, 0, 0x20, 0,                // mov edi, 0x200000
    // read:
    0x8b, 0x07,                         // mov eax, [edi]
    0x81, 0xc7, 0, 0x10, 0, 0,          // add edi, 0x1000
    0x81, 0xff, 0, 0, 0, 0x10,          // cmp edi, 0x10000000
    0x72, 0xf0,                         // jb read
    0xb0, b'.', 0xee,                   // mov al, '.'; out dx, al
    0xbf, 0, 0, 0x20, 0,                // mov edi, 0x200000
    // write:
    0xff, 0x07,                         // inc dword [edi]
    0x81, 0xc7, 0, 0x10, 0, 0,          // add edi, 0x1000
    0x81, 0xff, 0, 0, 0xa0, 0,          // cmp edi, 0xa00000
    0x72, 0xf0,                         // jb write
    0xb0, b':', 0xee,                   // mov al, ':'; out dx, al
    0xeb, 0xce,                         // jmp round
];

/// Writes a kernel to `path` that writes to all of its 256 MiB but the first two, and then goes on as [`TOUCH`].
///
/// # Panics
/// If that fails.
pub fn write_toucher(path: &Path) {
    std::fs::write(path, elf(&[&fill(256 << 20), TOUCH].concat())).expect("the kernel can be written");
}

/// The number in a line of the counter's.
#[must_use]
pub fn tick(line: &str) -> Option<u32> {
    u32::from_str_radix(line.trim().strip_prefix("tick ")?, 16).ok()
}

/// An ELF file of one loadable segment and one note.
fn elf(code: &[u8]) -> Vec<u8> {
    let code_offset: u64 = 0x1000;
    let note_offset: u64 = 64 + 2 * 56;
    let mut note = Vec::new();
    for word in [4, 4, PVH_ENTRY] {
        note.extend(u32::to_le_bytes(word));
    }
    note.extend(b"Xen\0");
    note.extend(ENTRY.to_le_bytes());
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend(2u16.to_le_bytes()); // executable
    file.extend(62u16.to_le_bytes()); // x86-64
    file.extend(1u32.to_le_bytes());
    for word in [u64::from(ENTRY), 64, 0] {
        file.extend(word.to_le_bytes()); // entry, program headers, no section headers
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 2, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let length = |bytes: &[u8]| u64::try_from(bytes.len()).expect("small");
    header(&mut file, [1, 7], [code_offset, ENTRY.into(), ENTRY.into(), length(code), length(code), 0x1000]);
    header(&mut file, [4, 4], [note_offset, 0, 0, length(&note), length(&note), 4]);
    file.extend(note);
    file.resize(0x1000, 0);
    file.extend(code);
    file
}

/// A program header: type and flags; offset, two addresses, two sizes, alignment.
fn header(file: &mut Vec<u8>, kind: [u32; 2], words: [u64; 6]) {
    kind.iter().for_each(|word| file.extend(word.to_le_bytes()));
    words.iter().for_each(|word| file.extend(word.to_le_bytes()));
}
