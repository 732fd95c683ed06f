//! What happens while daemons and pods come, change and go: enrolment, discovery, takeover, fail closed, unload.

#[path = "../common/mod.rs"]
mod common;

mod changes;
mod claims;
mod discovery;
mod drain;
mod ended;
mod enrolment;
mod enrolment_addresses;
mod enrolment_churn;
mod fail_closed;
mod fail_closed_restart;
mod flap;
mod gate;
mod listeners;
mod plaintext;
mod pods;
mod remote_clusters;
mod takeover;
mod unload;
