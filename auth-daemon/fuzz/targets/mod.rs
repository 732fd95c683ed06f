//! What reads bytes that others wrote: peers on the wire, nodes that request certificates, control planes, operators in
//! files.

mod authority;
mod bundle;
mod config;
mod crl;
mod csr;
mod frame;
mod hello;
mod identity;
mod istiod;
mod jwt;
mod kubeconfig;
mod manifest;
mod nri;
mod record;
mod svid;
mod token;
mod tunnel;
mod workload_api;

use std::time::Duration;

/// A run that takes longer hangs. Not less, as the tests run the targets in the CPU time that emulators leave.
const LONG: Duration = Duration::from_secs(300);

/// Runs one target on an input. Panics if the target's promise is broken.
pub(crate) type Target = fn(&[u8]);

/// The targets, by name. Their seeds are in `seeds/<name>`.
pub(crate) const TARGETS: [(&str, Target); 18] = [
    ("authority", authority::run),
    ("bundle", bundle::run),
    ("config", config::run),
    ("crl", crl::run),
    ("csr", csr::run),
    ("frame", frame::run),
    ("hello", hello::run),
    ("identity", identity::run),
    ("istiod", istiod::run),
    ("jwt", jwt::run),
    ("kubeconfig", kubeconfig::run),
    ("manifest", manifest::run),
    ("nri", nri::run),
    ("record", record::run),
    ("svid", svid::run),
    ("token", token::run),
    ("tunnel", tunnel::run),
    ("workload_api", workload_api::run),
];
