//! Finds the eBPF objects that the daemon embeds: in the folder AUTH_EBPF_OBJECTS, or where `cargo xtask build-ebpf` puts
//! them.

use std::{env, path::PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=AUTH_EBPF_OBJECTS");
    let folder = env::var_os("AUTH_EBPF_OBJECTS").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/bpf"),
        PathBuf::from,
    );
    for (variable, name) in [
        ("AUTH_EBPF", "auth-ebpf"),
        ("AUTH_EBPF_INBOUND", "auth-ebpf-inbound"),
    ] {
        let object = folder.join(name);
        println!("cargo::rerun-if-changed={}", object.display());
        match object.canonicalize() {
            Ok(object) => println!("cargo::rustc-env={variable}={}", object.display()),
            Err(error) => println!(
                "cargo::error=the eBPF programs are not built ({}: {error}): run `cargo xtask build-ebpf`",
                object.display()
            ),
        }
    }
}
