//! The committed code belongs to the protobuf files. `UPDATE=1 cargo test -p auth-ca-api` writes it anew.

mod current;

#[test]
fn generated_code_is_current() {
    current::check(
        env!("CARGO_MANIFEST_DIR"),
        env!("CARGO_PKG_NAME"),
        &["istio_ca.proto", "auth_ca.proto"],
        tonic_prost_build::configure(),
        &["istio.v1.auth.rs", "auth_daemon.ca.v1.rs"],
    );
}
