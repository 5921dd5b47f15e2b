//! Templates and applications: runs each application in its own virtual machine.

fn main() {}
