//! Code that the scenarios share: their initial pods, and the peers and applications in them.
#![allow(dead_code, reason = "each test binary uses a part")]

pub(crate) mod admin_port;
pub(crate) mod authority;
pub(crate) mod by_uid;
pub(crate) mod early;
pub(crate) mod frames;
pub(crate) mod hostile;
pub(crate) mod lifecycle_pair;
pub(crate) mod lifecycle_traces;
pub(crate) mod neighbours;
pub(crate) mod pair;
pub(crate) mod resumption;
pub(crate) mod servers;
pub(crate) mod stage;
pub(crate) mod terminal;
pub(crate) mod two_endpoints;
pub(crate) mod with_ca;
