//! The results of tests, counted from libtest's output.

use std::collections::BTreeMap;

/// The results of a run.
#[derive(Debug, Default)]
pub struct Summary {
    passed: usize,
    failed: usize,
    ignored: usize,
    /// The failed tests, and what they failed with, where that is known.
    failures: BTreeMap<String, Option<String>>,
    skipped: BTreeMap<String, String>,
}

impl Summary {
    /// Adds the result of one test and what it printed.
    pub fn add(&mut self, test: &str, passed: bool, output: &str) {
        output.lines().for_each(|line| self.skipped(line));
        if passed {
            self.passed += 1;
        } else {
            self.failed += 1;
            self.failures.insert(test.to_owned(), panic_message(output));
        }
    }

    /// Adds tests that were not requested.
    pub fn add_ignored(&mut self, count: usize) {
        self.ignored += count;
    }

    /// Reads one line that cargo or libtest printed.
    pub fn line(&mut self, line: &str) {
        if let Some(result) = line.strip_prefix("test result: ") {
            self.passed += count(result, "passed");
            self.failed += count(result, "failed");
            self.ignored += count(result, "ignored");
        } else if let Some(test) = line
            .strip_prefix("test ")
            .and_then(|line| line.strip_suffix(" ... FAILED"))
        {
            self.failures.insert(test.to_owned(), None);
        } else {
            self.skipped(line);
        }
    }

    /// A test that cannot run here prints `SKIPPED name: reason` and passes.
    fn skipped(&mut self, line: &str) {
        if let Some((test, reason)) = line
            .trim_start()
            .strip_prefix("SKIPPED ")
            .and_then(|line| line.split_once(": "))
        {
            self.skipped.insert(test.to_owned(), reason.to_owned());
        }
    }

    /// The skipped and the failed tests, and the numbers on the last line.
    pub fn describe(&self) -> String {
        let mut text = String::new();
        for (test, reason) in &self.skipped {
            text += &format!("SKIPPED {test}: {reason}\n");
        }
        for (test, message) in &self.failures {
            let message = message.as_ref().map(|message| format!(": {message}"));
            text += &format!("FAILED {test}{}\n", message.unwrap_or_default());
        }
        let passed = self.passed();
        let (failed, skipped, ignored) = (self.failed, self.skipped.len(), self.ignored);
        text + &format!(
            "tests: {passed} passed, {failed} failed, {skipped} skipped, {ignored} ignored\n"
        )
    }

    /// How many passed without being skipped: to libtest, a skipped test has passed.
    pub fn passed(&self) -> usize {
        self.passed.saturating_sub(self.skipped.len())
    }

    /// The names of the tests that failed.
    pub fn failed_tests(&self) -> Vec<String> {
        self.failures.keys().cloned().collect()
    }

    /// The tests that were skipped, and why.
    pub fn skipped_tests(&self) -> Vec<String> {
        let skipped = self.skipped.iter();
        skipped
            .map(|(test, reason)| format!("{test}: {reason}"))
            .collect()
    }
}

/// The first line of the message of the first panic.
fn panic_message(output: &str) -> Option<String> {
    let mut lines = output.lines();
    lines.find(|line| line.starts_with("thread '") && line.contains(" panicked at "))?;
    lines.next().map(str::to_owned)
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
    fn sums_the_results_of_all_programs() {
        let mut summary = Summary::default();
        OUTPUT.lines().for_each(|line| summary.line(line));
        assert_eq!((summary.passed, summary.failed, summary.ignored), (3, 1, 4));
        assert_eq!(summary.failed_tests(), ["bad"]);
        assert_eq!(
            summary.describe(),
            "SKIPPED absent: no kTLS here\nFAILED bad\n\
             tests: 2 passed, 1 failed, 1 skipped, 4 ignored\n"
        );
    }

    #[test]
    fn counts_single_tests() {
        let mut summary = Summary::default();
        summary.add("a::good", true, "test good ... ok\n");
        summary.add("a::absent", true, "SKIPPED absent: no kTLS here\n");
        let output = "---- bad stdout ----\n\nthread 'bad' (7) panicked at tests/a.rs:9:5:\nit went wrong\nsince\n";
        summary.add("a::bad", false, output);
        summary.add("a::killed", false, "test killed ...");
        summary.add_ignored(2);
        assert_eq!(
            summary.describe(),
            "SKIPPED absent: no kTLS here\nFAILED a::bad: it went wrong\nFAILED a::killed\n\
             tests: 1 passed, 2 failed, 1 skipped, 2 ignored\n"
        );
    }
}
