//! `cargo xtask bench scale`: the cost of a large cluster for a node daemon.

use std::fmt::Write;

use anyhow::Result;
use serde_json::Value;

use super::built_in::built_in;

/// Builds and runs the benchmark of the registry and of discovery, and prints its measurements.
///
/// # Errors
/// If it does not build, or fails.
pub(super) fn run(json: bool) -> Result<()> {
    let measured = built_in("scale", "measure a large cluster")?;
    if json {
        println!("{measured}");
    } else {
        print!("{}", table(&measured));
    }
    Ok(())
}

fn table(measured: &Value) -> String {
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let megabytes = |value: &Value| number(value) / f64::from(1 << 20);
    let rows = [
        (
            "a connection's lookup, service (ns)",
            number(&measured["serviceLookupNs"]),
        ),
        (
            "a connection's lookup, pod (ns)",
            number(&measured["podLookupNs"]),
        ),
        ("one pod's change (µs)", number(&measured["changeMicros"])),
        (
            "registry, per 1,000 pods (MiB)",
            megabytes(&measured["bytesPerThousandPods"]),
        ),
        ("registry filled (s)", number(&measured["fillSeconds"])),
    ];
    let mut out = format!(
        "{} pods, {} services\n\n",
        measured["pods"], measured["services"]
    );
    let mut row = |what: &str, value: f64| {
        let _ = writeln!(out, "{what:<52}{value:>10.2}");
    };
    for (what, value) in rows {
        row(what, value);
    }
    let sync = &measured["sync"];
    match sync["skipped"].as_str() {
        Some(why) => {
            let _ = writeln!(out, "read from an API server: skipped: {why}");
        }
        None => {
            row(
                "read from an API server, page by page (s)",
                number(&sync["seconds"]),
            );
            let bytes = megabytes(&sync["bytesPerThousandPods"]);
            row("resident memory for that, per 1,000 pods (MiB)", bytes);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_row_for_each_figure() {
        let mut measured = json!({
            "pods": 50, "services": 5, "serviceLookupNs": 90.5, "podLookupNs": 80, "changeMicros": 4.25,
            "bytesPerThousandPods": 1 << 20, "fillSeconds": 0.5, "sync": {"skipped": "no server"},
        });
        let text = table(&measured);
        assert!(text.starts_with("50 pods, 5 services\n"), "{text}");
        assert!(
            text.contains("service (ns)") && text.contains(" 90.50\n"),
            "{text}"
        );
        assert!(text.ends_with("skipped: no server\n"), "{text}");
        measured["sync"] = json!({"seconds": 3.5, "bytesPerThousandPods": 2 << 20});
        let text = table(&measured);
        assert!(
            text.contains(" 3.50\n") && text.ends_with(" 2.00\n"),
            "{text}"
        );
    }
}
