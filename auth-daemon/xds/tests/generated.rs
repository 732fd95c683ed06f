//! The committed code belongs to the protobuf files. `UPDATE=1 cargo test -p auth-xds` writes it anew.

#[path = "../../ca-api/tests/generated/current.rs"]
mod current;

#[test]
fn generated_code_is_current() {
    current::check(
        env!("CARGO_MANIFEST_DIR"),
        env!("CARGO_PKG_NAME"),
        &["discovery.proto", "workload.proto", "authorization.proto"],
        tonic_prost_build::configure().btree_map("."),
        &[
            "envoy.service.discovery.v3.rs",
            "istio.workload.rs",
            "istio.security.rs",
        ],
    );
}
