//! The committed code belongs to the protobuf file. `UPDATE=1 cargo test -p auth-workload-api` writes it anew.

#[path = "../../ca-api/tests/generated/current.rs"]
mod current;

#[test]
fn generated_code_is_current() {
    current::check(
        env!("CARGO_MANIFEST_DIR"),
        env!("CARGO_PKG_NAME"),
        &["workload.proto"],
        tonic_prost_build::configure().btree_map("."),
        &["_.rs"],
    );
}
