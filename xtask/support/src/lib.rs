//! What the commands of `cargo xtask` share: they build the project, install the programs that they need, and run
//! programs as [steps](step) with their progress shown.
#![forbid(unsafe_code)]

pub mod apt;
pub mod build;
pub mod build_ebpf;
pub mod cargo_install;
pub mod deb;
pub mod kubernetes;
pub mod page;
pub mod peers;
pub mod release;
pub mod reproducible;
pub mod setup;
pub mod step;
pub mod supervise;
pub mod toolchain;
