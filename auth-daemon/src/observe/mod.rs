//! Observability of connections: the access log, the open connections, and counters.

mod access_limits;
pub mod access_log;
mod bounded;
pub(crate) mod connect_times;
pub mod connections;
pub mod flows;
pub(crate) mod istio;
pub mod judgement;
pub(crate) mod line_limit;
pub(crate) mod log_writer;
#[cfg(test)]
pub(crate) mod memory;
pub mod pairs;
pub(crate) mod refusals;
pub mod remote_clusters;
mod sharded;
mod size;
pub mod totals;
