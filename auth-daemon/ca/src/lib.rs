//! The CA of a trust domain: it issues certificates to workloads, revokes them, and rotates its root. `docs/CA.md` is for
//! its operators.
//!
//! From the bottom up: [`config`]; [`csr`], `signer`, `intermediate` and `crl` make certificates and lists; `rotation`,
//! [`join`] and `state` are pure, and [`store`] keeps the state; [`authority`] does what it is asked; [`attest`] and
//! [`placement`] decide who may ask for what, and [`quotas`] how much; `connection`, `service`, `operator` and [`server`] answer, and `audit`
//! logs it. [`leader`] elects the replica that does so, `control`, [`roots`] and [`distribution`] write
//! to the cluster, and [`embedded`] is a CA without a server.

pub mod attest;
mod audit;
pub mod authority;
pub mod bundle_endpoint;
pub mod config;
mod connection;
mod control;
mod counters;
mod crl;
pub mod csr;
pub mod distribution;
pub mod embedded;
mod intermediate;
pub mod join;
pub mod leader;
mod operator;
pub mod placement;
pub mod quotas;
pub mod roots;
mod rotation;
pub mod server;
mod server_tls;
mod service;
mod signer;
mod state;
pub mod status;
pub mod store;
mod view;
