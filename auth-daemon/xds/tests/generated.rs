//! The committed code belongs to the protobuf files. `UPDATE=1 cargo test -p auth-xds` writes it anew.

use std::{env, fs, path::Path};

#[test]
fn generated_code_is_current() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let protocols = ["discovery.proto", "workload.proto", "authorization.proto"];
    let files = protox::compile(protocols, [package.join("proto")]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    tonic_prost_build::configure()
        .btree_map(".")
        .out_dir(folder.path())
        .compile_fds(files)
        .unwrap();
    for name in [
        "envoy.service.discovery.v3.rs",
        "istio.workload.rs",
        "istio.security.rs",
    ] {
        let current = fs::read_to_string(folder.path().join(name)).unwrap();
        let committed = package.join("src/generated").join(name);
        if env::var_os("UPDATE").is_some() {
            fs::write(&committed, &current).unwrap();
        }
        let found = fs::read_to_string(&committed).unwrap_or_default();
        assert!(
            found == current,
            "{} is not current: run `UPDATE=1 cargo test -p auth-xds`",
            committed.display()
        );
    }
}
