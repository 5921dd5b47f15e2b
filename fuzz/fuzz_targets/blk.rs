//! A hostile driver of the blk device.
#![no_main]

spectrum_fuzz::device_target!(blk);
