//! What a snapshot may say of a device, and a hostile driver of what comes of it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio_devices::device::SavedState;
use virtio_devices::registry::KINDS;

fuzz_target!(|data: &[u8]| {
    let [kind, len, rest @ ..] = data else { return };
    let kind = KINDS[usize::from(*kind) % KINDS.len()];
    let (body, driver) = rest.split_at(rest.len().min(usize::from(*len)));
    let saved = SavedState { kind: kind.name.into(), version: 1, body: body.to_vec() };
    spectrum_fuzz::restored(kind, &saved, driver);
});
