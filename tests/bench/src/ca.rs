//! `cargo xtask bench ca`: how fast the CA issues on one core, compared with the bare cryptography.

use anyhow::{Result, ensure};
use serde_json::Value;

use super::built_in::built_in;

/// Builds and runs the CA's benchmark, and prints its measurements.
///
/// # Errors
/// If it does not build, or fails.
pub(super) fn run(json: bool) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    ensure!(
        cores >= 2,
        "the CA and its callers take a core each, and this machine has one"
    );
    let measured = built_in("ca", "measure the CA")?;
    if json {
        println!("{measured}");
    } else {
        print!("{}", table(&measured));
    }
    Ok(())
}

fn table(measured: &Value) -> String {
    let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
    let bare = number(&measured["barePerSecond"]);
    let mut out = format!(
        "one P-256 signature and one verification, on the CA's core: {bare:.0} a second\n\n\
         {:>8}  {:>14}  {:>7}  {:>20}  {:>20}\n",
        "revoked", "certificates/s", "of bare", "p50, p99 of 32 (ms)", "p50, p99 of 1 (ms)"
    );
    for row in measured["rows"].as_array().into_iter().flatten() {
        let pair = |a: &str, b: &str| format!("{:.2}, {:.2}", number(&row[a]), number(&row[b]));
        let rate = number(&row["perSecond"]);
        out.push_str(&format!(
            "{:>8}  {rate:>14.0}  {:>7.2}  {:>20}  {:>20}\n",
            row["revoked"],
            rate / bare,
            pair("p50", "p99"),
            pair("aloneP50", "aloneP99"),
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_row_for_each_state() {
        let table = table(&json!({
            "barePerSecond": 10_000.0,
            "rows": [{
                "revoked": 0, "perSecond": 2500.0, "p50": 1.0, "p99": 2.5, "aloneP50": 0.5, "aloneP99": 0.75,
            }],
        }));
        assert!(table.contains("10000 a second"), "{table}");
        let row = table.lines().last().unwrap_or_default();
        let cells: Vec<_> = row.split_whitespace().collect();
        assert_eq!(
            cells,
            ["0", "2500", "0.25", "1.00,", "2.50", "0.50,", "0.75"]
        );
    }
}
