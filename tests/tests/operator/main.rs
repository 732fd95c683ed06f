//! Commands, configuration, logs and memory of the daemon.

#[path = "../common/mod.rs"]
mod common;

mod commands;
mod config;
mod footprint;
mod logs;
mod policy_changes;
mod privileges;
