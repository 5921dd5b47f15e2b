//! Requests of the gpu device's control queue, and command streams of its contexts.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| rutabaga_glue::fuzz(data));
