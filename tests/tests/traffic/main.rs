//! Connections between pods of two nodes: addresses, services, endings, outages, redirection, policies, load, and addresses
//! that no object claims.

#[path = "../common/mod.rs"]
mod common;

mod addresses;
mod basics;
mod callers;
mod endings;
mod exposed;
mod load;
mod nested;
mod non_tcp;
mod outages;
mod policy;
mod redirection;
mod redirection_permissive;
mod services;
mod unclaimed;
