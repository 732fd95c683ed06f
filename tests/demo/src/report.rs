//! Output of the demo: each step with its evidence, a summary, and the JSON object for programs.

use std::io::{self, Write};
use std::time::Instant;

use anyhow::{Error, Result, anyhow};
use serde_json::json;

/// Collects the checks' results. Text for people goes to stdout; with JSON, which is alone on stdout, it goes to
/// stderr.
pub(super) struct Report {
    json: bool,
    text: Box<dyn Write>,
    /// The names of all checks.
    checks: Vec<&'static str>,
    start: Instant,
    running: Option<Running>,
    done: Vec<Done>,
}

struct Running {
    /// `None` for a part of the setup.
    name: Option<&'static str>,
    claim: &'static str,
    start: Instant,
    evidence: Vec<String>,
}

struct Done {
    name: &'static str,
    ok: bool,
    evidence: Vec<String>,
}

impl Report {
    /// A report on checks of these names.
    pub(super) fn new(json: bool, checks: Vec<&'static str>) -> Self {
        let text: Box<dyn Write> = if json {
            Box::new(io::stderr())
        } else {
            Box::new(io::stdout())
        };
        Self::with(json, text, checks)
    }

    fn with(json: bool, text: Box<dyn Write>, checks: Vec<&'static str>) -> Self {
        Self {
            json,
            text,
            checks,
            start: Instant::now(),
            running: None,
            done: Vec::new(),
        }
    }

    pub(super) fn begins(&mut self, name: Option<&'static str>, claim: &'static str) {
        match name {
            Some(name) => self.print(&format!("\n== {name}: {claim}")),
            None => self.print(&format!("\n-- {claim}")),
        }
        if self.done.is_empty() && self.running.is_none() {
            // Building is not part of the demo.
            self.start = Instant::now();
        }
        self.running = Some(Running {
            name,
            claim,
            start: Instant::now(),
            evidence: Vec::new(),
        });
    }

    pub(super) fn saw(&mut self, what: String) {
        self.print(&format!("   {what}"));
        if let Some(running) = &mut self.running {
            running.evidence.push(what);
        }
    }

    /// Ends the current step. Returns an error if a part of the setup failed, because nothing else can run then.
    pub(super) fn ends(&mut self, result: Result<()>) -> Result<()> {
        let Some(mut running) = self.running.take() else {
            return Ok(());
        };
        let seconds = running.start.elapsed().as_secs_f64();
        let Some(name) = running.name else {
            return result.map_err(|error| error.context(running.claim));
        };
        let ok = result.is_ok();
        match result {
            Ok(()) => self.print(&format!("   ok, {seconds:.1} s")),
            Err(error) => {
                let why = format!("{error:#}");
                self.print(&format!("   FAILED after {seconds:.1} s: {why}"));
                running.evidence.push(format!("FAILED: {why}"));
            }
        }
        self.done.push(Done {
            name,
            ok,
            evidence: running.evidence,
        });
        Ok(())
    }

    /// Prints the summary and returns the names of the checks that failed or, because of `broken`, did not run.
    pub(super) fn finish(mut self, broken: Option<&Error>) -> Vec<&'static str> {
        self.complete(broken);
        if self.json {
            let _ = writeln!(io::stdout(), "{}", self.object());
        }
        let passed = self.done.iter().filter(|done| done.ok).count();
        self.print(&format!(
            "\n{passed} of {} checks passed in {:.1} s",
            self.done.len(),
            self.start.elapsed().as_secs_f64()
        ));
        let lines: Vec<_> = self.done.iter().map(Done::line).collect();
        for line in lines {
            self.print(&line);
        }
        let failed = self.done.iter().filter(|done| !done.ok);
        failed.map(|done| done.name).collect()
    }

    /// Sets the result of each check.
    fn complete(&mut self, broken: Option<&Error>) {
        let why = broken.map_or("the demo ended early".to_owned(), |error| {
            format!("{error:#}")
        });
        if self
            .running
            .as_ref()
            .is_some_and(|check| check.name.is_some())
        {
            let _ = self.ends(Err(anyhow!("{why}")));
        }
        for name in &self.checks {
            if self.done.iter().all(|done| done.name != *name) {
                self.done.push(Done {
                    name,
                    ok: false,
                    evidence: vec![format!("{NOT_RUN}{why}")],
                });
            }
        }
    }

    fn object(&self) -> serde_json::Value {
        let checks: Vec<_> = self
            .done
            .iter()
            .map(|done| json!({"name": done.name, "ok": done.ok, "evidence": done.evidence.join("; ")}))
            .collect();
        json!({ "checks": checks })
    }

    fn print(&mut self, line: &str) {
        // A reader that has closed the pipe (`| head`) is no reason to leave the mesh behind.
        let _ = writeln!(self.text, "{line}");
    }
}

impl Done {
    /// Its line of the summary.
    fn line(&self) -> String {
        let result = match self.evidence.last() {
            _ if self.ok => "ok",
            // The reason is printed once, at the end.
            Some(why) if why.starts_with(NOT_RUN) => "not run",
            _ => "FAILED",
        };
        format!("  {result:8}{}", self.name)
    }
}

const NOT_RUN: &str = "not run: ";

#[cfg(test)]
mod tests {
    use super::*;

    const CHECKS: [&str; 4] = ["plaintext-before", "mtls-on-wire", "port-kept", "same-node"];

    #[test]
    fn every_check_has_a_result() {
        let mut report = Report::with(true, Box::new(io::sink()), CHECKS.to_vec());
        report.begins(None, "set-up");
        report.ends(Ok(())).unwrap();
        report.begins(Some("plaintext-before"), "claim");
        report.saw("one".to_owned());
        report.saw("two".to_owned());
        report.ends(Ok(())).unwrap();
        report.begins(Some("mtls-on-wire"), "claim");
        report.ends(Err(anyhow!("no TLS"))).unwrap();
        let object = report.object();
        assert_eq!(
            object["checks"][0],
            json!({"name": "plaintext-before", "ok": true, "evidence": "one; two"})
        );
        assert_eq!(object["checks"][1]["ok"], false);
        report.begins(Some("port-kept"), "claim");
        report.complete(Some(&anyhow!("interrupted")));
        assert_eq!(report.done.len(), CHECKS.len());
        assert_eq!(report.done.iter().filter(|done| done.ok).count(), 1);
        assert_eq!(
            report.object()["checks"][2]["evidence"],
            "FAILED: interrupted"
        );
    }

    #[test]
    fn a_failing_part_of_the_set_up_is_an_error() {
        let mut report = Report::with(true, Box::new(io::sink()), CHECKS.to_vec());
        report.begins(None, "set-up");
        assert!(report.ends(Err(anyhow!("no"))).is_err());
        report.complete(None);
        assert_eq!(report.done.len(), CHECKS.len());
        assert!(report.done.iter().all(|done| !done.ok));
    }
}
