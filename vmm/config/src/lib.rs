//! The one configuration value of a virtual machine.
