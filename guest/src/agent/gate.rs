//! Whether the VM may run anything: not before it has taken on an identity, and not after it was restored until it has
//! taken on another.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Closed at first.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<State>,
    knocked: Condvar,
}

#[derive(Debug, Default)]
struct State {
    awake: bool,
    knocks: u64,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No state is left half-way when a thread panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the gate when `take_on` has succeeded. Whoever asks in the meantime waits.
    pub fn wake<E>(&self, take_on: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let mut state = self.lock();
        state.awake = false;
        take_on()?;
        state.awake = true;
        Ok(())
    }

    /// Closes the gate.
    pub fn sleep(&self) {
        self.lock().awake = false;
    }

    /// True while the gate is open.
    pub fn is_awake(&self) -> bool {
        self.lock().awake
    }

    /// Counts a connection from the host: there is somebody again.
    pub fn knock(&self) {
        let mut state = self.lock();
        state.knocks = state.knocks.wrapping_add(1);
        self.knocked.notify_all();
    }

    /// How many connections there have been, for [`Gate::wait_for_knock`].
    pub fn knocks(&self) -> u64 {
        self.lock().knocks
    }

    /// Waits for a connection that [`Gate::knocks`] has not counted in `seen`.
    pub fn wait_for_knock(&self, seen: u64) {
        let state = self.lock();
        drop(self.knocked.wait_while(state, |state| state.knocks == seen).unwrap_or_else(PoisonError::into_inner));
    }
}
