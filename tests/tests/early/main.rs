//! Data that an app sends before its connection is established, and TLS resumption.

#[path = "../common/mod.rs"]
mod common;

mod at_most_once;
mod callers;
mod endings;
mod resumption;
mod resumption_renewal;
mod retries;
mod sessions;
mod sizes;
