//! Connections between pods of one node, which its kernel joins.

#[path = "../common/mod.rs"]
mod common;

mod changes;
mod connections;
mod endings;
mod hostile;
mod policy;
mod shares;
