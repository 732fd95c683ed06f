//! Pods that take more than their share, and what their neighbours notice of it.
//!
//! Pods and daemons have CPU shares, as in a cluster. Ratios to the quiet state are printed; only a very long median fails
//! a test, because the machine's load decides them too. Outcomes are asserted: every connection of the neighbour succeeds,
//! what exceeds the attacker's share is refused with a reason, and what the attack took comes back.

#[path = "../common/mod.rs"]
mod common;

mod connections;
mod control;
mod peers;
mod processes;
mod stage;
mod tools;
