//! What [`crate::VmConfig::check`] is told about the host, and what it answers.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// What a check needs to know about the host. The caller finds it out, so that a check stays a pure function.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// Memory of the host, in bytes.
    pub memory: u64,
    /// Size of a page, in bytes; a power of two.
    pub page_size: u64,
    /// The most virtual CPUs one machine can have (`KVM_CAP_MAX_VCPUS`).
    pub max_vcpus: u32,
    /// Sizes in bytes of the files the configuration names and that exist. Where a persistent-memory image lies in the
    /// guest's address space depends on its size.
    pub file_sizes: BTreeMap<PathBuf, u64>,
}

impl HostFacts {
    /// The size of a file in bytes, if it is there.
    #[must_use]
    pub fn file_size(&self, path: &Path) -> Option<u64> {
        self.file_sizes.get(path).copied()
    }
}

/// What kind of thing is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProblemKind {
    /// A value that no machine can have.
    Value,
    /// Two parts that exclude each other.
    Conflict,
    /// Something this VMM does not do yet.
    NotSupported,
    /// Nothing to boot. Cloud Hypervisor accepts this in `vm.create` and reports it at `vm.boot`.
    NoPayload,
}

/// One thing that is wrong with a configuration, as a sentence for its author.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// What kind of thing.
    pub kind: ProblemKind,
    /// Where: the path of the field in the JSON, such as `disks[1].path`; the flag of that name has the same.
    pub field: String,
    /// What is wrong there and what to do.
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.field, self.text)
    }
}

impl std::error::Error for Problem {}
