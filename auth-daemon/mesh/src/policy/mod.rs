//! Authorization: which connections the policies allow. Pure functions, without I/O or a clock.
//!
//! `api` parses the objects that users write, and `reading` says what each enforces in this mesh. From that, `compile`
//! builds what connections are checked against, `explain` gives the reasons for a verdict, and `question` answers
//! questions of users. The daemon verifies the caller's identity before any of this.

pub mod api;
mod bits;
mod compile;
pub mod diff;
#[cfg(test)]
mod examples;
mod explain;
mod fields;
#[cfg(test)]
mod generated;
#[cfg(test)]
mod naive;
pub mod question;
mod reading;
mod rules;
pub mod selecting;
pub mod suggest;
mod trust_domain;
mod warnings;

pub use compile::{
    Connection, Decision, Hit, PeerMode, Policies, Settings, Verdict, WorkloadPolicy,
};
pub use explain::{Explanation, Finding, Outcome, explain};
pub use reading::Warning;
