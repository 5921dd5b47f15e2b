//! What applications may do beyond their VM: the rules, the decisions made by them, and the questions to the user.
//!
//! [`DecisionPoint::decide`] is all that others need.

mod ask;
mod point;
mod record;
mod rules;

pub use point::DecisionPoint;
pub use record::read as read_log;
pub use rules::{Action, Policy, Service};
