//! What an operator sees and sets: commands, configuration, logs, and what the daemon costs.

#[path = "../common/mod.rs"]
mod common;

mod commands;
mod config;
mod footprint;
mod logs;
mod policy_changes;
