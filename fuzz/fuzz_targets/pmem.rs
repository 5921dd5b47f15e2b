//! A hostile driver of the pmem device.
#![no_main]

spectrum_fuzz::device_target!(pmem);
