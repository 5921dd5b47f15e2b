//! A hostile driver of a network interface, and a hostile other side.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (length, rest) = data.split_first().map_or((0, data), |(first, rest)| (usize::from(*first) * 16, rest));
    let (said, driver) = rest.split_at(length.min(rest.len()));
    spectrum_fuzz::net(said, driver);
});
