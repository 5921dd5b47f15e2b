//! A hostile driver of the console device.
#![no_main]

spectrum_fuzz::device_target!(console);
