//! Whole-VM tests: they drive the programs as a user does.
