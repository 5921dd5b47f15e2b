//! Where programs and kernels are: as `scripts/build` says in the environment, or where a plain build puts them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The directory of this source tree.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("this crate is in a workspace").to_owned()
}

/// A program of this workspace.
///
/// # Panics
/// If it has not been built: a test that cannot run has failed.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let directory = std::env::var_os("SPECTRUM_BIN").map_or_else(
        || {
            // target/debug/deps/test-0123 is beside target/debug/program.
            let this = std::env::current_exe().expect("a test knows its own path");
            this.ancestors().nth(2).expect("a test lies in deps/").to_owned()
        },
        PathBuf::from,
    );
    existing(directory.join(name))
}

/// A file of the prepared guest kernel: `vmlinuz`, `vmlinux`.
///
/// # Panics
/// If it is not there.
#[must_use]
pub fn kernel(name: &str) -> PathBuf {
    let directory = std::env::var_os("SPECTRUM_KERNEL").map_or_else(|| root().join("build/kernel"), PathBuf::from);
    existing(directory.join(name))
}

/// This file.
///
/// # Panics
/// If it is not there.
#[must_use]
pub fn existing(path: PathBuf) -> PathBuf {
    assert!(path.exists(), "{} is missing: build it with scripts/build", path.display());
    path
}

/// Processes that have a path in `folder` on their command line, and that line.
///
/// # Panics
/// If there is no /proc.
#[must_use]
pub fn processes_of(folder: &Path) -> BTreeMap<u32, String> {
    let folder = folder.to_string_lossy();
    let all = std::fs::read_dir("/proc").expect("proc").flatten();
    let lines = all.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        // One that has just ended has none.
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        Some((pid, String::from_utf8_lossy(&line).replace('\0', " ")))
    });
    lines.filter(|(_, line)| line.contains(&*folder)).collect()
}

/// Files of kernel modules and of what they need, in the order to load them.
///
/// # Panics
/// If the kernel has no such module.
#[must_use]
pub fn modules(names: &[&str]) -> Vec<PathBuf> {
    if names.is_empty() {
        return Vec::new();
    }
    let output = Command::new(root().join("scripts/kernel")).arg("modules").args(names).output();
    let output = output.expect("scripts/kernel can be run");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).lines().map(PathBuf::from).collect()
}
