//! What the demo prints: each step with its evidence as it comes, a summary, and the JSON object for programs.

use std::io::{self, Write};
use std::time::Instant;

use anyhow::{Error, Result, anyhow};
use serde_json::json;

use super::{AFTER, BEFORE};

/// Collects the checks' results. For people it writes on stdout; with JSON, which is alone on stdout, on stderr.
pub(super) struct Report {
    json: bool,
    start: Instant,
    running: Option<Running>,
    done: Vec<Done>,
}

struct Running {
    /// None for a part of the set-up.
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
    pub(super) fn new(json: bool) -> Self {
        Self {
            json,
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

    /// The end of what began last. An error when it was a part of the set-up that failed: nothing else can be shown.
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

    /// Prints the end of it and gives the names of the checks that failed or, because of `broken`, were not run.
    pub(super) fn finish(mut self, broken: Option<&Error>) -> Vec<&'static str> {
        if let Some(broken) = broken {
            if self
                .running
                .as_ref()
                .is_some_and(|check| check.name.is_some())
            {
                // Only a check's own result is an error of that check.
                let _ = self.ends(Err(anyhow!("{broken:#}")));
            }
            self.running = None;
            let rest: Vec<_> = (BEFORE.iter().chain(&AFTER))
                .filter(|check| self.done.iter().all(|done| done.name != check.name))
                .map(|check| Done {
                    name: check.name,
                    ok: false,
                    evidence: vec![format!("not run: {broken:#}")],
                })
                .collect();
            self.done.extend(rest);
        }
        if self.json {
            let _ = writeln!(io::stdout(), "{}", self.object());
        }
        let passed = self.done.iter().filter(|done| done.ok).count();
        self.print(&format!(
            "\n{passed} of {} checks passed in {:.1} s",
            self.done.len(),
            self.start.elapsed().as_secs_f64()
        ));
        for done in &self.done {
            let (mark, reason) = match (done.ok, done.evidence.last()) {
                (true, _) => ("ok    ", String::new()),
                (false, reason) => ("FAILED", format!(": {}", reason.map_or("", |r| r))),
            };
            self.print(&format!("  {mark}  {}{reason}", done.name));
        }
        let failed = self.done.iter().filter(|done| !done.ok);
        failed.map(|done| done.name).collect()
    }

    fn object(&self) -> serde_json::Value {
        let checks: Vec<_> = self
            .done
            .iter()
            .map(|done| json!({"name": done.name, "ok": done.ok, "evidence": done.evidence.join("; ")}))
            .collect();
        json!({ "checks": checks })
    }

    fn print(&self, line: &str) {
        // A reader that has left (`| head`) is no reason to leave the mesh standing.
        let _ = if self.json {
            writeln!(io::stderr(), "{line}")
        } else {
            writeln!(io::stdout(), "{line}")
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_check_has_a_result() {
        let mut report = Report::new(true);
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
        let failed = report.finish(Some(&anyhow!("interrupted")));
        assert_eq!(failed.len(), BEFORE.len() + AFTER.len() - 1);
    }

    #[test]
    fn a_failing_part_of_the_set_up_is_an_error() {
        let mut report = Report::new(true);
        report.begins(None, "set-up");
        assert!(report.ends(Err(anyhow!("no"))).is_err());
        assert_eq!(
            report.finish(Some(&anyhow!("no"))).len(),
            BEFORE.len() + AFTER.len()
        );
    }
}
