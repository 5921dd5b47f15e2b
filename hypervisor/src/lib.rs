//! The only crate that talks to /dev/kvm.
