//! Which request is admitted in which state: a pure function.
//!
//! ```text
//!                create                 boot                   pause
//!   NotCreated ─────────▶ Created ─────────────▶ Running ──────────────▶ Paused
//!       ▲                  │  ▲                   │    ▲──────────────────┘ │
//!       │      delete      │  └──── shutdown ─────┘         resume          │
//!       └──────────────────┴◀──────────────── shutdown ─────────────────────┘
//! ```
//! `restore` leads from NotCreated to Paused, or with `resume` to Running; `snapshot` is admitted in Paused, `live-snapshot` in Running. `reboot` leads from Running or Paused to Running. Grants
//! come and go in Running and Paused. `delete` is admitted everywhere and shuts down first. `ping` and
//! `vmm.shutdown` are admitted everywhere; `info` as soon as a machine is created.

use vmm_api::{Action, Failure, VmState};

/// Where the machine is; `None` until one is created.
pub type State = Option<VmState>;

/// What the control thread is to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Carry it out.
    Admit,
    /// It is so already: answer with success, do nothing.
    Nothing,
    /// Refuse.
    Refuse(Failure),
}

/// Decides on a request.
#[must_use]
pub fn decide(state: State, action: Action) -> Decision {
    use Action::{
        VmAddGrant, VmBoot, VmClone, VmCreate, VmDelete, VmInfo, VmLiveSnapshot, VmPause, VmPowerButton, VmReboot,
        VmRemoveGrant, VmRestore, VmResume, VmShutdown, VmSnapshot, VmWorkingSet, VmmPing, VmmShutdown,
    };
    use VmState::{Created, Paused, Running, Shutdown};
    match (action, state) {
        (VmmPing | VmmShutdown, _) => Decision::Admit,
        (VmCreate | VmRestore, None) | (VmInfo | VmDelete, Some(_)) | (VmBoot, Some(Created | Shutdown)) => {
            Decision::Admit
        }
        (VmPause | VmPowerButton | VmLiveSnapshot, Some(Running)) | (VmResume | VmSnapshot, Some(Paused)) => {
            Decision::Admit
        }
        (VmShutdown | VmReboot | VmWorkingSet | VmAddGrant | VmRemoveGrant, Some(Running | Paused)) => Decision::Admit,
        (VmDelete, None) => Decision::Nothing,
        (VmClone, _) => {
            Decision::Refuse(Failure::Other(vec!["only a zygote makes clones; start one with --zygote".into()]))
        }
        (VmCreate | VmRestore, Some(_)) => Decision::Refuse(Failure::AlreadyCreated),
        (VmInfo | VmBoot, None) => Decision::Refuse(Failure::NotCreated),
        (VmBoot, Some(Running | Paused)) => Decision::Refuse(Failure::AlreadyRunning),
        (VmPause, Some(Paused)) => Decision::Refuse(Failure::Other(vec!["VM is already paused".into()])),
        (VmResume, Some(Running)) => Decision::Refuse(Failure::Other(vec!["VM is not paused".into()])),
        (VmLiveSnapshot, Some(Paused)) => {
            Decision::Refuse(Failure::Other(vec!["VM is paused; take an ordinary snapshot of it".into()]))
        }
        (VmSnapshot, Some(Running)) => {
            Decision::Refuse(Failure::Other(vec!["VM is running; pause it before taking a snapshot".into()]))
        }
        (
            VmPause | VmResume | VmShutdown | VmReboot | VmPowerButton | VmSnapshot | VmLiveSnapshot | VmWorkingSet
            | VmAddGrant | VmRemoveGrant,
            _,
        ) => Decision::Refuse(Failure::NotRunning),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The state after an admitted request.
    fn after(state: State, action: Action) -> State {
        match action {
            Action::VmCreate | Action::VmShutdown => Some(VmState::Created),
            Action::VmBoot | Action::VmResume | Action::VmReboot => Some(VmState::Running),
            Action::VmPause => Some(VmState::Paused),
            Action::VmDelete => None,
            Action::VmRestore => Some(VmState::Paused),
            _ => state,
        }
    }

    const ALL: [Action; 18] = [
        Action::VmmPing,
        Action::VmmShutdown,
        Action::VmCreate,
        Action::VmBoot,
        Action::VmInfo,
        Action::VmPause,
        Action::VmResume,
        Action::VmShutdown,
        Action::VmDelete,
        Action::VmReboot,
        Action::VmPowerButton,
        Action::VmSnapshot,
        Action::VmRestore,
        Action::VmClone,
        Action::VmLiveSnapshot,
        Action::VmWorkingSet,
        Action::VmAddGrant,
        Action::VmRemoveGrant,
    ];

    #[test]
    fn the_usual_life() {
        let mut state = None;
        for action in [
            Action::VmCreate,
            Action::VmBoot,
            Action::VmPause,
            Action::VmResume,
            Action::VmReboot,
            Action::VmPause,
            Action::VmShutdown,
            Action::VmBoot,
            Action::VmDelete,
            Action::VmCreate,
        ] {
            assert_eq!(decide(state, action), Decision::Admit, "{action:?} in {state:?}");
            state = after(state, action);
        }
    }

    proptest! {
        /// Whatever was asked before: what runs can be shut down, what is created can be deleted and created again.
        #[test]
        fn there_is_always_a_way_out(requests in prop::collection::vec(0usize..ALL.len(), 0..30)) {
            let mut state = None;
            for r in requests {
                if decide(state, ALL[r]) == Decision::Admit {
                    state = after(state, ALL[r]);
                }
            }
            prop_assert_ne!(decide(state, Action::VmDelete), Decision::Refuse(Failure::NotCreated));
            prop_assert_eq!(decide(None, Action::VmCreate), Decision::Admit);
            if matches!(state, Some(VmState::Running | VmState::Paused)) {
                prop_assert_eq!(decide(state, Action::VmShutdown), Decision::Admit);
            }
        }
    }
}
