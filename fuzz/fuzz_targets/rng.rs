//! A hostile driver of the rng device.
#![no_main]

spectrum_fuzz::device_target!(rng);
