//! What an application in its VM is like: how soon it is there, what it takes, and how fast its files are.

pub mod apps;
pub mod grants;
mod tap;
