//! Finds the eBPF object that the daemon embeds.

use std::{env, path::PathBuf};

fn main() {
    ebpf_object();
}

fn ebpf_object() {
    println!("cargo::rerun-if-env-changed=AUTH_EBPF_OBJECT");
    let object = env::var_os("AUTH_EBPF_OBJECT").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../target/bpf/auth-ebpf"),
        PathBuf::from,
    );
    println!("cargo::rerun-if-changed={}", object.display());
    match object.canonicalize() {
        Ok(object) => println!("cargo::rustc-env=AUTH_EBPF_OBJECT={}", object.display()),
        Err(error) => println!(
            "cargo::error=the eBPF programs are not built ({}: {error}): run `cargo xtask build-ebpf`",
            object.display()
        ),
    }
}
