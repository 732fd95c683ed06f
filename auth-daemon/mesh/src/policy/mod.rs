//! Authorization: which connections the policies allow. Pure functions, without I/O or a clock.
//!
//! `api` reads the objects that users write, `compile` builds from them what connections are checked against, `explain`
//! gives the reasons for a verdict, and `question` answers questions of users. The daemon verifies the caller's
//! identity before any of this.

pub mod api;
mod bits;
mod compile;
#[cfg(test)]
mod examples;
mod explain;
mod fields;
#[cfg(test)]
mod generated;
#[cfg(test)]
mod naive;
pub mod question;
mod rules;
mod trust_domain;

pub use compile::{
    Connection, Decision, Hit, PeerMode, Policies, Settings, Verdict, WorkloadPolicy,
};
pub use explain::{Explanation, Finding, Outcome, explain};
