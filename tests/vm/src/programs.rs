//! The scenario tests that run in a machine, and where its programs are.

use std::collections::BTreeMap;

use anyhow::Result;
use test_runner::binaries::{self, Binary};

/// The folder of our own programs in a machine.
pub(super) const OURS: &str = "/opt/auth-daemon";

/// The tests of one module of a test binary.
#[derive(Debug)]
pub(super) struct Tests {
    /// `binary::module`, as in `tests/tests/binary/module.rs`.
    pub(super) name: String,
    pub(super) binary: String,
    /// Their names within the binary: `module::test`.
    pub(super) tests: Vec<String>,
}

/// Builds the scenario tests, and lists those of the modules that are `wanted` whose name contains one of the filters, or
/// all. Returns their binaries, too.
///
/// # Errors
/// If they do not build.
pub(super) fn build(
    wanted: impl Fn(&str) -> bool,
    filters: &[String],
) -> Result<(Vec<Binary>, Vec<Tests>)> {
    // With the features that the whole workspace asks for, so that a run of all tests has built the same.
    let mut binaries = binaries::build(&["--workspace", "--test", "*"])?;
    binaries.retain(|binary| binary.package.ends_with("tests"));
    let mut modules: BTreeMap<String, Tests> = BTreeMap::new();
    for binary in &binaries {
        for test in binary.tests()? {
            let Some((module, _)) = test.split_once("::") else {
                continue;
            };
            let name = format!("{}::{module}", binary.name);
            let chosen = filters.is_empty() || filters.iter().any(|filter| test.contains(filter));
            if wanted(&name) && chosen {
                modules
                    .entry(name.clone())
                    .or_insert_with(|| Tests {
                        name,
                        binary: binary.name.clone(),
                        tests: Vec::new(),
                    })
                    .tests
                    .push(test);
            }
        }
    }
    let modules: Vec<Tests> = modules.into_values().collect();
    binaries.retain(|binary| modules.iter().any(|tests| tests.binary == binary.name));
    Ok((binaries, modules))
}
