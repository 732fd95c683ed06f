//! Servers to run in a pod: real programs, and one in the test's own process.

mod in_process;
mod iperf3;
mod nginx;
mod openssl;

pub use in_process::InProcess;
pub use iperf3::Iperf3;
pub use nginx::{Nginx, NginxRequest};
pub use openssl::OpensslServer;
