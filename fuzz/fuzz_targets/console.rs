#![no_main]
spectrum_fuzz::device_target!(console);
