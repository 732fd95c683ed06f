//! Connections between pods of one node, which the kernel carries after a verdict.

#[path = "../common/mod.rs"]
mod common;

mod changes;
mod connections;
mod endings;
mod hostile;
mod links;
mod policy;
mod routes;
mod shares;
