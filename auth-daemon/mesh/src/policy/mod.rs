//! Who may call whom: plain functions of what is known. No I/O, no clock.
//!
//! `api` reads the objects that users write, `compile` makes of them what a connection is checked against, `explain`
//! tells why, and `question` lets people ask. `source` asks before all of that whether the caller is who it says.

pub mod api;
mod bits;
mod compile;
#[cfg(test)]
mod examples;
mod explain;
mod fields;
#[cfg(test)]
mod naive;
pub mod question;
mod rules;

pub use compile::{
    Connection, Decision, Hit, PeerMode, Policies, Settings, Verdict, WorkloadPolicy,
};
pub use explain::{Explanation, Finding, Outcome, explain};
