//! Commands, configuration, logs and memory of the daemon.

#[path = "../common/mod.rs"]
mod common;

mod alerts;
mod commands;
mod config;
mod dashboard;
mod footprint;
mod istio_metrics;
mod logs;
mod observe;
mod policy_changes;
mod privileges;
mod seen;
mod top;
