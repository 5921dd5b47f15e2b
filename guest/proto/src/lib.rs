//! The protocol between the launcher and the agent in the guest.
