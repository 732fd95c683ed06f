//! Test binaries: building them, and listing the tests in them.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use xtask_support::step::{cargo, show};

/// A test binary that cargo has built.
#[derive(Debug)]
pub struct Binary {
    /// The target's name: the file or folder in `tests/`, or the crate.
    pub name: String,
    /// The executable.
    pub path: PathBuf,
    /// The folder of its package, in which its tests expect to run.
    pub package: PathBuf,
    /// Whether it comes from the package's `tests/` folder.
    pub integration: bool,
}

/// Builds the test binaries that cargo's options select.
///
/// # Errors
/// If something does not compile.
pub fn build(options: &[&str]) -> Result<Vec<Binary>> {
    let mut command = cargo();
    command
        .args(["test", "--release", "--no-run"])
        .args(options)
        .arg("--message-format=json-render-diagnostics")
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot run `{}`", show(&command)))?;
    let output = child.stdout.take().context("cargo has no output")?;
    let mut binaries = Vec::new();
    for line in BufReader::new(output).lines() {
        binaries.extend(parse(&line.context("cannot read cargo's output")?));
    }
    if !child.wait().context("cannot wait for cargo")?.success() {
        bail!("the tests do not build");
    }
    binaries.sort_by(|a: &Binary, b| (a.integration, &a.name).cmp(&(b.integration, &b.name)));
    Ok(binaries)
}

/// One of cargo's messages, if it is about a test binary.
fn parse(line: &str) -> Option<Binary> {
    #[derive(Deserialize)]
    struct Message {
        target: Target,
        profile: Profile,
        executable: PathBuf,
        manifest_path: PathBuf,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
        kind: Vec<String>,
    }
    #[derive(Deserialize)]
    struct Profile {
        test: bool,
    }
    let message: Message = serde_json::from_str(line).ok()?;
    message.profile.test.then(|| Binary {
        name: message.target.name,
        path: message.executable,
        package: message
            .manifest_path
            .parent()
            .map(Path::to_path_buf)
            .unwrap_or_default(),
        integration: message.target.kind.iter().any(|kind| kind == "test"),
    })
}

impl Binary {
    /// The names of its tests, except those that are ignored.
    ///
    /// # Errors
    /// If the binary cannot be run.
    pub fn tests(&self) -> Result<Vec<String>> {
        let all = self.list(&[])?;
        let ignored = self.list(&["--ignored"])?;
        Ok(all
            .into_iter()
            .filter(|test| !ignored.contains(test))
            .collect())
    }

    /// The names of its ignored tests.
    ///
    /// # Errors
    /// As [`Self::tests`].
    pub fn ignored(&self) -> Result<Vec<String>> {
        self.list(&["--ignored"])
    }

    fn list(&self, options: &[&str]) -> Result<Vec<String>> {
        let output = self
            .command()
            .args(["--list", "--format", "terse"])
            .args(options)
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("cannot run {}", self.path.display()))?;
        if !output.status.success() {
            bail!("{} --list: {}", self.path.display(), output.status);
        }
        Ok(String::from_utf8_lossy(&output.stdout)
            .lines()
            .filter_map(|line| line.strip_suffix(": test"))
            .map(str::to_owned)
            .collect())
    }

    /// A command that runs the binary as `cargo test` does.
    pub fn command(&self) -> Command {
        self.prepared(Command::new(&self.path))
    }

    /// As [`Self::command`], for a program that uses the CPU time that others leave (chrt(1)).
    pub(crate) fn command_for_spare_time(&self) -> Command {
        let mut command = Command::new("chrt");
        command.args(["--idle", "0"]).arg(&self.path);
        self.prepared(command)
    }

    fn prepared(&self, mut command: Command) -> Command {
        command
            .current_dir(&self.package)
            .env("CARGO_MANIFEST_DIR", &self.package)
            .stdin(Stdio::null());
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_test_binaries_only() {
        let message = |test: bool, executable: &str| {
            format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"/w/tests/Cargo.toml",
                "target":{{"kind":["test"],"name":"early"}},"profile":{{"test":{test}}},"executable":{executable}}}"#
            )
        };
        let binary = parse(&message(true, r#""/w/target/early-1""#)).unwrap();
        assert_eq!((binary.name.as_str(), binary.integration), ("early", true));
        assert_eq!(binary.package, Path::new("/w/tests"));
        assert!(parse(&message(false, r#""/w/target/pod-app""#)).is_none());
        assert!(parse(&message(true, "null")).is_none());
        assert!(parse(r#"{"reason":"build-finished","success":true}"#).is_none());
    }
}
