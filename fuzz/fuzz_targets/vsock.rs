//! A hostile driver of the vsock device.
#![no_main]

spectrum_fuzz::device_target!(vsock);
