//! Observability of connections: the access log, the open connections, and counters.

mod access_limits;
pub mod access_log;
pub mod connections;
pub mod flows;
pub(crate) mod line_limit;
pub(crate) mod log_writer;
pub mod pairs;
pub(crate) mod refusals;
mod sharded;
pub mod totals;
