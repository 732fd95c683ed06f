//! Finds the eBPF object that the daemon embeds, and turns the CA's protocols into Rust.

use std::{env, path::PathBuf};

const PROTOCOLS: [&str; 2] = ["istio_ca.proto", "auth_ca.proto"];

fn main() {
    ebpf_object();
    protocols();
}

fn protocols() {
    println!("cargo::rerun-if-changed=proto");
    let compiled = protox::compile(PROTOCOLS, ["proto"])
        .map_err(|error| error.to_string())
        .and_then(|files| {
            tonic_prost_build::configure()
                .compile_fds(files)
                .map_err(|error| error.to_string())
        });
    if let Err(error) = compiled {
        println!("cargo::error=proto: {error}");
    }
}

fn ebpf_object() {
    println!("cargo::rerun-if-env-changed=AUTH_EBPF_OBJECT");
    let object = env::var_os("AUTH_EBPF_OBJECT").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/bpf/auth-ebpf"),
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
