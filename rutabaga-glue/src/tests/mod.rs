//! A fake guest in front of the real device and the real rutabaga, with a compositor that is real or made to misbehave.

mod compositor;
mod defects;
mod guest;
mod sway;
mod wire;
