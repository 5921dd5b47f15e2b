//! The one configuration value of a virtual machine.

/// Placeholder.
#[derive(Debug, Clone, Default)]
pub struct VmConfig {
    /// Placeholder.
    pub rng: RngConfig,
}
/// Placeholder.
#[derive(Debug, Clone)]
pub struct RngConfig {
    /// Placeholder.
    pub src: std::path::PathBuf,
}
impl Default for RngConfig {
    fn default() -> Self {
        Self { src: "/dev/urandom".into() }
    }
}
/// Placeholder.
#[derive(Debug, Clone, Default)]
pub struct HostFacts {}
