//! Compares committed code with what its protobuf files generate.

use std::{env, fs, path::Path};

use tonic_prost_build::Builder;

/// Generates code from `protocols`, files in the folder `proto` of the package at `root`, and fails if it differs from `code`, the
/// package's files in `src/generated`. With `UPDATE` in the environment, writes these anew.
pub(crate) fn check(
    root: &str,
    package: &str,
    protocols: &[&str],
    builder: Builder,
    code: &[&str],
) {
    let root = Path::new(root);
    let files = protox::compile(protocols, [root.join("proto")]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    builder.out_dir(folder.path()).compile_fds(files).unwrap();
    for name in code {
        let current = fs::read_to_string(folder.path().join(name)).unwrap();
        let committed = root.join("src/generated").join(name);
        if env::var_os("UPDATE").is_some() {
            fs::write(&committed, &current).unwrap();
        }
        let found = fs::read_to_string(&committed).unwrap_or_default();
        assert!(
            found == current,
            "{} is not current: run `UPDATE=1 cargo test -p {package}`",
            committed.display()
        );
    }
}
