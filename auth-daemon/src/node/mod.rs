//! Serves a node: enrols its pods, accepts their connections, and passes these to the data path's threads, where
//! [`proxy`](crate::proxy) handles them.

mod acceptor;
mod connection_tasks;
mod enrolment;
mod precedence;
mod pulse;
pub mod redirection;
mod remote_clusters;
mod revocation;
mod workers;
mod workload_socket;

pub use enrolment::Enrolment;
pub use pulse::Pulse;
pub use workers::Workers;
pub(crate) use workload_socket::remove_socket;
