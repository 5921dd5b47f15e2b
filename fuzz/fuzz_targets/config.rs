//! The configuration: JSON and the command line's flags, and what is read survives being written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm_config::{ConsoleConfig, DiskConfig, HostFacts, PmemConfig, VmConfig, VsockConfig, parse_size};

fuzz_target!(|data: &[u8]| {
    if let Ok(config) = VmConfig::from_json(data) {
        let host = HostFacts { memory: 8 << 30, page_size: 4096, max_vcpus: 254, ..HostFacts::default() };
        let _ = config.check(&host);
    }
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = DiskConfig::parse(text);
        let _ = PmemConfig::parse(text);
        let _ = ConsoleConfig::parse(text);
        let _ = VsockConfig::parse(text);
        let _ = parse_size(text);
    }
});
