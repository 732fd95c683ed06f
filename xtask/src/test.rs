//! `cargo xtask test`: all tests against the built daemon, and what became of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::step::{self, cargo, programs, root, step};
use crate::{build, kubernetes, setup};

/// Options of the test run.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only tests whose name contains one of these; further options go to the test programs
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "FILTER"
    )]
    filters: Vec<String>,
}

/// Installs and builds what the tests need, runs them, and sums up.
///
/// # Errors
/// When not root, when something does not build, or when a test fails.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if !root() {
        bail!(
            "the tests make network namespaces and load eBPF programs: run them as root (sudo -E cargo xtask test)"
        );
    }
    setup::run()?;
    kubernetes::ensure_or_say();
    build::run()?;
    run_tests(&["--workspace"], &arguments.filters)
}

/// Runs those tests that cargo's options choose and whose name contains a filter, and sums up.
///
/// # Errors
/// When one fails.
pub(crate) fn run_tests(options: &[&str], filters: &[String]) -> Result<()> {
    step("run the tests", || {
        let mut command = cargo();
        command
            .args(["test", "--release", "--no-fail-fast"])
            .args(options)
            .args(["--", "--show-output"])
            .args(filters)
            .env("AUTH_DAEMON", programs()?.join("auth-daemon"));
        let (passed, summary) = watch(command)?;
        eprint!("\n{}", summary.describe());
        if !passed {
            bail!("the tests failed: {}", summary.failures());
        }
        Ok(())
    })
}

/// Runs the tests, shows what they print (but not that of tests that passed), and keeps all of it in a file.
fn watch(mut command: Command) -> Result<(bool, Summary)> {
    let path = programs()?.join("test.log");
    let mut log =
        fs::File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("    all output goes to {}", path.display());

    // One pipe for both, so that cargo's lines ("Running …") keep their place between the tests' own.
    let (reader, writer) = io::pipe().context("cannot make a pipe")?;
    command
        .stdin(Stdio::null())
        .stdout(writer.try_clone().context("cannot make a pipe")?)
        .stderr(writer);
    let mut child = command
        .spawn()
        .with_context(|| format!("cannot run `{}`", step::show(&command)))?;
    // It holds the pipe's other end: we would never see the end of it.
    drop(command);

    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    let mut summary = Summary::default();
    loop {
        match lines.recv_timeout(Duration::from_secs(1)) {
            Ok(mut line) => {
                let shown = summary.line(String::from_utf8_lossy(&line).trim_end());
                line.push(b'\n');
                log.write_all(&line)
                    .with_context(|| format!("cannot write {}", path.display()))?;
                if shown {
                    io::stdout().write_all(&line).context("cannot print")?;
                }
            }
            // A program that a test left behind may hold the pipe open for ever.
            Err(RecvTimeoutError::Timeout) => {
                if child
                    .try_wait()
                    .context("cannot wait for the tests")?
                    .is_some()
                {
                    break;
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
        }
    }
    let status = child.wait().context("cannot wait for the tests")?;
    Ok((status.success(), summary))
}

/// What became of the tests, read from what cargo and libtest print.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    /// The test program that is running.
    program: String,
    /// Each program's closing line.
    results: Vec<(String, String)>,
    passed: usize,
    failed: usize,
    ignored: usize,
    failures: BTreeSet<String>,
    skipped: BTreeMap<String, String>,
    /// Inside what passing tests printed.
    quiet: bool,
}

impl Summary {
    /// Takes one line of output, and tells whether it is worth showing.
    pub(crate) fn line(&mut self, line: &str) -> bool {
        if let Some(program) = line
            .trim_start()
            .strip_prefix("Running ")
            .or_else(|| line.trim_start().strip_prefix("Doc-tests "))
        {
            self.program = program.split(" (").next().unwrap_or(program).to_owned();
            if let Some((_, path)) = program.rsplit_once('/') {
                // `unittests src/lib.rs (target/release/deps/mesh_tests-0123456789abcdef)`: the crate's name helps more.
                let name = path
                    .trim_end_matches(')')
                    .rsplit_once('-')
                    .map_or(path, |(name, _)| name);
                self.program = format!("{name}: {}", self.program);
            }
        } else if let Some(result) = line.strip_prefix("test result: ") {
            self.quiet = false;
            self.passed += count(result, "passed");
            self.failed += count(result, "failed");
            self.ignored += count(result, "ignored");
            self.results.push((self.program.clone(), line.to_owned()));
        } else if let Some(test) = line
            .strip_prefix("test ")
            .and_then(|line| line.strip_suffix(" ... FAILED"))
        {
            self.failures.insert(test.to_owned());
        } else if let Some((test, reason)) = line
            .trim_start()
            .strip_prefix("SKIPPED ")
            .and_then(|line| line.split_once(": "))
        {
            self.skipped.insert(test.to_owned(), reason.to_owned());
        } else if line == "successes:" {
            self.quiet = true;
        } else if line == "failures:" {
            self.quiet = false;
        }
        !self.quiet
    }

    fn describe(&self) -> String {
        let mut text = String::new();
        for (program, result) in self
            .results
            .iter()
            .filter(|(_, result)| !result.contains("ok. 0 passed; 0 failed; 0 ignored"))
        {
            text += &format!("{result}  [{program}]\n");
        }
        for (test, reason) in &self.skipped {
            text += &format!("SKIPPED {test}: {reason}\n");
        }
        for test in &self.failures {
            text += &format!("FAILED {test}\n");
        }
        let passed = self.passed();
        let (failed, skipped, ignored) = (self.failed, self.skipped.len(), self.ignored);
        text + &format!(
            "tests: {passed} passed, {failed} failed, {skipped} skipped, {ignored} ignored\n"
        )
    }

    /// How many did what they are there for: a skipped test has passed in libtest's eyes.
    pub(crate) fn passed(&self) -> usize {
        self.passed.saturating_sub(self.skipped.len())
    }

    /// The names of tests that failed.
    pub(crate) fn failed_tests(&self) -> Vec<String> {
        self.failures.iter().cloned().collect()
    }

    /// Tests that were skipped, and why.
    pub(crate) fn skipped_tests(&self) -> Vec<String> {
        let skipped = self.skipped.iter();
        skipped
            .map(|(test, reason)| format!("{test}: {reason}"))
            .collect()
    }

    fn failures(&self) -> String {
        if self.failures.is_empty() {
            // A test program that was killed reports nothing.
            return "a test program ended without a result, see its output above".to_owned();
        }
        self.failures.iter().cloned().collect::<Vec<_>>().join(", ")
    }
}

/// The number before a word in `ok. 3 passed; 0 failed; 1 ignored; …`.
fn count(result: &str, what: &str) -> usize {
    let words: Vec<&str> = result.split([' ', ';']).collect();
    words
        .windows(2)
        .find(|pair| pair[1] == what)
        .and_then(|pair| pair[0].parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
    Finished `release` profile [optimized + debuginfo] target(s) in 0.1s
     Running unittests src/lib.rs (target/release/deps/mesh_tests-0123456789abcdef)

running 3 tests
test good ... ok
test absent ... ok
test bad ... FAILED

successes:

---- absent stdout ----
SKIPPED absent: no kTLS here

successes:
    absent
    good

failures:

---- bad stdout ----
it went wrong

failures:
    bad

test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s

error: test failed, to rerun pass `-p mesh-tests --lib`
   Doc-tests mesh_tests

running 1 test
test src/lib.rs - x (line 3) ... ok

test result: ok. 1 passed; 0 failed; 4 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    #[test]
    fn results_of_all_programs_are_summed() {
        let mut summary = Summary::default();
        let shown: Vec<&str> = OUTPUT.lines().filter(|line| summary.line(line)).collect();
        assert_eq!((summary.passed, summary.failed, summary.ignored), (3, 1, 4));
        assert_eq!(summary.failures(), "bad");
        let text = summary.describe();
        assert!(text.contains("1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s  [mesh_tests: unittests"), "{text}");
        assert!(
            text.contains("SKIPPED absent: no kTLS here\nFAILED bad\n"),
            "{text}"
        );
        assert!(
            text.ends_with("tests: 2 passed, 1 failed, 1 skipped, 4 ignored\n"),
            "{text}"
        );
        // What a failed test printed is shown; what passed tests printed is not.
        assert!(
            shown.contains(&"it went wrong") && !shown.contains(&"---- absent stdout ----"),
            "{shown:?}"
        );
        assert!(
            shown
                .iter()
                .filter(|line| line.starts_with("test result:"))
                .count()
                == 2
        );
    }

    #[test]
    fn a_program_that_was_killed_is_not_a_success() {
        let summary = Summary::default();
        assert!(summary.failures().contains("without a result"));
        assert_eq!(
            summary.describe(),
            "tests: 0 passed, 0 failed, 0 skipped, 0 ignored\n"
        );
    }
}
