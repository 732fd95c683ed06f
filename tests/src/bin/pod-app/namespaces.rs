//! Network namespaces that a process creates inside its pod.

use std::net::{Ipv4Addr, UdpSocket};

use clap::Args;
use nix::sched::{CloneFlags, unshare};
use serde_json::json;

use crate::report::{At, Outcome};

/// Creates one network namespace after another, and a socket in each
#[derive(Debug, Clone, Args)]
pub(crate) struct Namespaces {
    /// Number of namespaces
    #[arg(long)]
    count: u64,
}

impl Namespaces {
    pub(crate) fn run(self) -> Outcome {
        for _ in 0..self.count {
            unshare(CloneFlags::CLONE_NEWNET).at("create a namespace")?;
            UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).at("create a socket")?;
        }
        Ok(json!({"created": self.count}))
    }
}
